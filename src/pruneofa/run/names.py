"""Names of stages and of their folders, as a finished run has them. No recipe, which the base install cannot read."""

from dataclasses import dataclass

RECORD = "stage.json"


@dataclass(frozen=True)
class StageId:
    """A stage of a run: `variant` of `task` with `seed`; task and seed are None for the stages on plain text.

    Variants are those of results.json. `str()` is its name in bars, logs, errors and results.
    """

    task: str | None
    seed: int | None
    variant: str

    @property
    def path(self) -> str:
        """Folder of the stage, relative to the run's folder."""
        if self.task is None:
            return "sparse" if self.variant == "prune" else self.variant
        return f"tasks/{self.task}/seed-{self.seed}/{'teacher' if self.variant == 'dense' else self.variant}"

    def __str__(self) -> str:
        return self.variant if self.task is None else self.path
