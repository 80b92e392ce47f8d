"""The method as the stages of a run: plan, stages, results, estimate, demo."""
