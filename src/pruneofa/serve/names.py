"""Which model a request's `model` field means."""

from pruneofa.serve.call import Call
from pruneofa.serve.model import Model
from pruneofa.serve.refusal import Refused


def named(call: Call, task: str, name: str | None) -> Model:
    """The model of that name, or the first that does the task where a request names none.

    Where one model alone does the task it answers for any name that is not served: clients of OpenAI must send one, and
    text-embeddings-inference ignores it.

    Raises:
        Refused: several models do the task and the name is none of theirs, or the model named does not do the task.
    """
    if name is None or name in call.serving.models:
        return call.model(task, name)
    able = [model.name for model in call.serving.models.values() if model.does(task)]
    if len(able) > 1:
        raise Refused("NotFound", f"no such model; wanted one of {', '.join(able)}", cause="model")
    return call.model(task)
