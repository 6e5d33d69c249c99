"""The GPT: model, loss, optimizer, training loop, evaluation, generation; corpus/ makes its token files."""
