"""Small Transformers that fail like large ones: model, parametrization, optimizers, schedules, data."""
