"""One linear layer of pruneofa or of torch, in a process that answers JSON requests as `peers.py` does."""

from typing import Any

import numpy as np

from pruneofa.bench.peers import PRUNEOFA, Job, Process, Run, answer_requests, quantize_dynamic


def build(job: Job) -> Run:
    """Its product on one thread, of "weight" and "x" in the job's "inputs": ours, or torch's dynamic int8 (oneDNN)."""
    with np.load(job["inputs"]) as stored:
        weight, x = stored["weight"], stored["x"]
    if job["peer"] == PRUNEOFA:
        from pruneofa.engine.engine import native
        from pruneofa.formats.convert import pack_linear

        packed = pack_linear(weight, "int8")
        linear = native.Linear(packed.bitmask, packed.values, packed.scale, None, weight.shape[1], job["isa"])
        return lambda: [linear.forward(x)]
    import torch

    torch.set_num_threads(1)
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(torch.from_numpy(weight), requires_grad=False)
    module, tensor = quantize_dynamic(torch.nn.Sequential(linear)), torch.from_numpy(x)

    def run() -> list[np.ndarray]:
        with torch.inference_mode():
            return [module(tensor).numpy()]

    return run


def main() -> None:
    """Answer the requests of another process."""
    process = Process()

    def layer(key: str, job: Job) -> dict[str, Any]:
        """Build one linear layer, to be timed as `key`."""
        process.runs[key] = build(job)
        return {}

    def save(key: str, path: str) -> dict[str, Any]:
        """Write the product, float32, as .npy."""
        np.save(path, np.asarray(process.runs[key]()[0], np.float32))
        return {}

    def forget(key: str) -> dict[str, Any]:
        """Free what `key` needs."""
        process.runs.pop(key, None)
        return {}

    answer_requests({"start": process.start, "time": process.time, "layer": layer, "save": save, "forget": forget})


if __name__ == "__main__":
    main()
