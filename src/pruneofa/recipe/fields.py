"""What the sections of a recipe are made of: types with their limits, the base class, fields that several have."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the seeds that NumPy's generator accepts
Names = str | list[str]
Precision = Literal["bf16", "fp32"]
RESOURCES_ONLY: dict[str, Any] = {"in_fingerprint": False}  # marks a field that affects time or memory but not results
SAVE_MINUTES = 5.0  # training that a kill can cost; copying the state for a checkpoint stops training for a moment


class Section(BaseModel):
    """A section. Unknown keys, NaN, infinity and values of another type are errors, except an integer for a float."""

    model_config = ConfigDict(extra="forbid", validate_default=True, strict=True, allow_inf_nan=False)

    def fingerprinted(self, exclude: set[str] | None = None) -> dict[str, Any]:
        """The values that affect a stage's results, with defaults: all fields except those marked RESOURCES_ONLY.

        `exclude`: fields that the stage does not use.
        """
        excluded = {
            name for name, field in type(self).model_fields.items() if field.json_schema_extra == RESOURCES_ONLY
        }
        return self.model_dump(exclude=excluded | (exclude or set()))


SAVE_MINUTES_FIELD = Field(
    SAVE_MINUTES, description="minutes between checkpoints; one is written at the end too",
    json_schema_extra=RESOURCES_ONLY,
)  # fmt: skip
SKIP_ZEROS_FIELD = Field(
    True, description="with a locked pattern, fp32 on a CPU: do not multiply by zeros; false: compute as a dense model",
    json_schema_extra=RESOURCES_ONLY,
)  # fmt: skip
