"""Reports, from tables of runs alone: no model is loaded here, and nothing here knows MLflow."""
