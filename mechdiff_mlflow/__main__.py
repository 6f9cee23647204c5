"""`python -m mechdiff_mlflow`, which needs no installation: what MLproject calls."""

from mechdiff_mlflow.cli import main

if __name__ == "__main__":
    main()
