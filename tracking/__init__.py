"""What makes an experiment traceable: run directories, fingerprints, resuming, MLflow, DVC's files, verification."""
