"""The stages of a run: plan, execution, results, estimate and demo."""
