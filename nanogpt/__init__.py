"""The core library: models, data, training, evaluation, generation. Knows no DVC and no click."""
