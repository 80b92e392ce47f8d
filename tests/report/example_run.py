"""What a finished run hands to the table, the card and the report, without training one."""

from typing import Any

from pruneofa.recipe import Recipe

HOME = "/home/somebody/models"


def entry(*values: float) -> dict[str, Any]:
    """A metric of one variant, seeds counted from 0."""
    return {
        "mean": sum(values) / len(values),
        "runs": [{"seed": seed, "value": value} for seed, value in enumerate(values)],
    }


def example_results() -> dict[str, Any]:
    """Two seeds, four tasks of the published table (no QNLI), a control for one, and an own task."""
    return {
        "recipe": {"name": "minilm-90"},
        "sparsity": 0.9000004,
        "versions": {"pruneofa": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
        "stages": {
            "teacher": {"tokens": 6_000_000, "seconds": 2400.0},
            "prune": {"tokens": 6_100_000, "seconds": 4200.5},
            "tasks/sst2/seed-0/transfer": {"tokens": 0, "seconds": 900.0},
        },
        "sizes": {
            "dense_fp32": 42_467_328,
            "nonzeros_bitmask_fp32": 5_573_760,
            "nonzeros_bitmask_int8": 2_388_768,
            "entropy_bound_int8": 1_684_000,
        },
        "latency": {},
        "tasks": {
            "squad": {
                "exact_match": {"dense": entry(70.0, 70.5), "transfer": entry(65.0, 66.0)},
                "f1": {"dense": entry(80.0, 80.2), "transfer": entry(76.0, 76.1)},
            },
            "mnli": {
                "accuracy": {"dense": entry(74.0, 74.2), "transfer": entry(71.0, 71.2)},
                "accuracy_mm": {"dense": entry(75.0, 75.2), "transfer": entry(72.0, 72.2)},
            },
            "qqp": {
                "accuracy": {"dense": entry(84.0, 84.2), "transfer": entry(82.0, 82.2)},
                "f1": {"dense": entry(79.0, 79.2), "transfer": entry(77.0, 77.2)},
            },
            "sst2": {
                "accuracy": {"dense": entry(89.5, 90.1), "transfer": entry(87.0, 87.4), "control": entry(84.0)},
            },
            "area": {"accuracy": {"bag_of_words": entry(55.0), "dense": entry(80.0), "transfer": entry(78.0)}},
        },
    }


def example_recipe(**changes: Any) -> dict[str, Any]:
    """The resolved recipe, with paths of one machine in it."""
    own = {"data": f"{HOME}/area.csv", "text": ["a|b"], "label": "area"}
    values = {
        "name": "minilm-90",
        "model": f"{HOME}/MiniLM-L6",
        "data_root": f"{HOME}/data",
        "corpus": {"source": [f"{HOME}/data/wiki", "../texts"], "short_seq_prob": 0.1},
        "teacher": {"steps": 1000},
        "prune": {"steps": 2000, "final": 0.9},
        "tasks": {"squad": {}, "mnli": {"data": "mnli"}, "qqp": {}, "sst2": {"data": "sst2/"}, "area": own},
        "control": True,
    }
    return Recipe.model_validate(values | changes).model_dump()


def example_inspection(layers: int = 6) -> dict[str, Any]:
    """What `pattern.inspect` says of a BERT of hidden size 384."""
    shapes = {
        "attention.self.query": (384, 384), "attention.self.key": (384, 384), "attention.self.value": (384, 384),
        "attention.output.dense": (384, 384), "intermediate.dense": (1536, 384), "output.dense": (384, 1536),
    }  # fmt: skip
    found = {
        f"encoder.layer.{layer}.{name}.weight": {
            "shape": [rows, columns], "sparsity": 0.9, "nonzeros": rows * columns // 10,
        }
        for layer in range(layers)
        for name, (rows, columns) in shapes.items()
    }  # fmt: skip
    pooler = {"shape": [384, 384], "sparsity": 0.9, "nonzeros": 14746}
    return {
        "encoder": 0.9000004,
        "pooler": 0.9,
        "layers": found | {"pooler.dense.weight": pooler},
        "pattern_hash": "ab" * 32,
        "pooler_hash": "cd" * 32,
        "nonzeros": sum(layer["nonzeros"] for layer in found.values()),
        "weights": sum(layer["shape"][0] * layer["shape"][1] for layer in found.values()),
        "sizes": example_results()["sizes"],
        "bits_per_weight": 4.2,
    }


def example_events() -> list[dict[str, Any]]:
    """log.jsonl of teacher, prune and control; prune was killed at step 1,000 and repeats its steps from 900."""
    events: list[dict[str, Any]] = [{"event": "start", "stage": "teacher", "step": 0, "steps": 1000}]
    for step in range(10, 1001, 10):
        mlm = 3 + 4 / (1 + step / 100)
        events.append({"event": "log", "stage": "teacher", "step": step, "lr": 1e-4, "loss": mlm + 0.4, "mlm": mlm})
    for step in [*range(10, 1001, 10), *range(900, 2001, 10)]:
        pruned = 0.9 * (1 - max(0.0, 1 - step / 1000) ** 3)
        rate = 5e-4 * (1 - (step % 20) / 1000 if step < 1000 else (2000 - step) / 1000)
        mlm = 3.2 + pruned * 0.8 - step / 4000
        parts = {"mlm": mlm, "nsp": 0.4, "kd": mlm / 3, "kd_nsp": 0.02, "hidden": 0.3 * pruned}
        events.append(
            {"event": "log", "stage": "prune", "step": step, "lr": rate, "loss": mlm, "sparsity": pruned, **parts}
        )
    for step in range(10, 2001, 10):
        mlm = 4.0 + 3 / (1 + step / 100)
        events.append(
            {"event": "log", "stage": "control", "peak_lr": 5e-5, "step": step, "lr": 1e-4, "loss": mlm, "mlm": mlm}
        )
    events.append({"event": "log", "stage": "tasks/sst2/seed-0/teacher", "step": 5, "loss": 0.6})
    return events
