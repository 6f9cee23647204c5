import pytest

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import Family
from mechdiff_mlflow.solvers import OffSpan
from mechdiff_mlflow.spec.choices import Choice
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.sites import Hook

CHOICES = (Family, Hook, OffSpan, Position)


@pytest.mark.parametrize("choices", CHOICES)
def test_a_choice_parses_its_own_text(choices: type[Choice]) -> None:
    assert [choices.parse(str(choice)) for choice in choices] == list(choices)


@pytest.mark.parametrize("choices", CHOICES)
def test_an_unknown_word_lists_the_known_ones(choices: type[Choice]) -> None:
    with pytest.raises(MechdiffError) as caught:
        choices.parse("nonsense")
    names = ", ".join(str(choice) for choice in choices)
    assert str(caught.value) == f"{choices.title()} 'nonsense' is unknown; use one of {names}."
