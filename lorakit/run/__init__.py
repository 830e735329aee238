"""A recipe, checked, becomes a run: model, method, data, training, evaluation, report, in one folder."""
