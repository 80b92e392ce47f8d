"""The method as stages of a run: plan, stages, results, estimate, demo."""
