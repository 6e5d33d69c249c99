"""The pipeline's stages, each run as `python -m stages.<name>`; dvc.yaml says in which order."""
