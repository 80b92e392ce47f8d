"""The engine: runs a sparse encoder and its task head on a CPU with the native kernels. No torch, no transformers."""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pruneofa.engine.heads import Classification, Embedding, Head, task_head
from pruneofa.engine.inputs import WANTED, as_matrix, as_row, check_item, check_range, finite, row_lengths
from pruneofa.engine.lanes import Plan, check_lanes, groups, meeting_cost, plan
from pruneofa.engine.load import Precision, Weights, build_encoder
from pruneofa.engine.question_answering import QuestionAnswering
from pruneofa.engine.threads import Threads, choose_threads, cpu_quota, usable_threads
from pruneofa.engine.tokenizer import TextTokenizer, Tokens
from pruneofa.errors import InputError
from pruneofa.families import POOLER_WEIGHT
from pruneofa.formats.architecture import check_tensors, read_architecture
from pruneofa.formats.convert import convert, pack_linear, quantize_weight
from pruneofa.formats.files import is_there
from pruneofa.formats.hub import local_folder
from pruneofa.formats.manifest import MANIFEST, is_packed
from pruneofa.formats.packed import Packed, PackedEmbedding, read
from pruneofa.formats.sentence import read_sentence
from pruneofa.formats.tensors import whole_or_shards
from pruneofa.progress import notice

try:
    from pruneofa import _native
except ImportError as error:  # a source tree that was not built; from_pretrained raises the error
    _native, _not_built = None, error
native: Any = _native


class Engine:
    """A loaded model, ready for inference; create it with `from_pretrained`.

    Several engines may run at the same time, and several Python threads may use one engine: they share its threads
    evenly. An engine works in a process that is forked off, and can be pickled: its folder and settings are.

    Attributes:
        isa: the kernels in use, one of `available_isas()`.
        threads: number of compute threads.
        threads_reason: what that number comes from.
        lanes: number of groups of threads that compute parts of a batch; None: chosen for each batch, see `plan`.
        barriers: how often the threads of a lane wait for each other in a pass.
        precision: "int8" or "fp32".
        activations: quantization of the inputs of int8 layers: "static" (scales from training) or "dynamic" (one scale
            per token); "float" if the precision is fp32.
        task: what `predict` does: "classification", "question answering", "token classification",
            "masked-LM" or "embedding".
        max_length: maximum number of tokens of a sequence, including special tokens.
        width: numbers of a token's hidden state.
        sparsity: fraction of zeros in the encoder's linear weights, the pooler excluded.
        labels: for classification the names of the classes by class id; otherwise empty.
        tokenizer: the folder's tokenizer.
        head: the computation after the encoder.
    """

    def __init__(
        self,
        packed: Packed,
        *,
        precision: Precision,
        threads: Threads,
        lanes: int | None = None,
        isa: str,
        wanted_isa: str | None = None,
    ) -> None:
        """Build the encoder for one ISA from checked arguments; removes the linear layers from `packed`.

        `wanted_isa` is what the caller asked for; None: whatever is fastest where the engine is unpickled.
        """
        folder = packed.folder
        architecture = read_architecture(packed.config, folder)
        sentence = read_sentence(folder)
        check_tensors(architecture, packed.shapes, folder, head=sentence is None)
        words, positions = (packed.embeddings[architecture.tables[name]].values for name in ("word", "position"))
        # No list of the layers: it would keep all of them in memory until the encoder is built.
        encoder = {name: linear.values.size for name, linear in packed.linears.items() if name != POOLER_WEIGHT}
        size = sum(math.prod(packed.linears[name].shape) for name in encoder)
        self.sparsity = 1 - sum(encoder.values()) / size
        weights = Weights(packed, native, isa)
        self.isa, self.precision = isa, precision
        self.threads, self.threads_reason, self.lanes = threads.count, threads.reason, lanes
        self._quota = cpu_quota()
        self._settings = {"precision": precision, "threads": threads.wanted, "lanes": lanes, "isa": wanted_isa}
        int8 = "dynamic" if packed.input_scales is None else "static"
        self.activations: str = int8 if precision == "int8" else "float"
        self._architecture, self._folder = architecture, folder.absolute()
        self._vocabulary = len(words)
        self.max_length = len(positions) - architecture.first_position
        self.width: int = architecture.hidden
        self.tokenizer = TextTokenizer(
            folder,
            vocabulary=self._vocabulary,
            types=architecture.types,
            limit=self.max_length,
            sentence=sentence,
        )
        # After the tokenizer, whose file takes as much memory to check as it gives back.
        self._encoder = build_encoder(native, weights, architecture, threads=self.threads, isa=isa)
        self.barriers: int = self._encoder.barriers
        self._meeting = meeting_cost(self.barriers, size, isa, precision)
        self.head: Head
        if sentence is None:
            self.head, self.task = task_head(weights, architecture, self.tokenizer), architecture.task
        else:
            self.head, self.task = Embedding.of(sentence), "embedding"
        self.labels = list(self.head.labels) if isinstance(self.head, Classification) else []

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        precision: Precision = "int8",
        threads: int | None = None,
        isa: str | None = None,
        lanes: int | None = None,
    ) -> Self:
        """Load a packed folder, any Hugging Face folder of a supported architecture, or a hub id.

        Args:
            path_or_id: a model of one of `pruneofa.families`; a folder that is not packed is packed in memory.
            precision: "int8" quantizes weights that are not int8 yet, and activations with the static scales of the
                folder if it has any, otherwise dynamically per token; a line says so of a folder packed in fp32.
                "fp32" keeps float32.
            threads: number of compute threads; default: PRUNEOFA_THREADS or OMP_NUM_THREADS if set, else one per
                physical core of the CPUs that this process may use, as far as its control groups' quota of CPU time
                goes. No more of them are used than can run at a time.
            lanes: number of groups of threads, 1 to `threads`, which compute parts of a batch at the same time without
                waiting for each other; default: chosen for each batch. It does not affect results.
            isa: the kernels to use; default: PRUNEOFA_ISA if set, else the fastest that this CPU supports.

        Raises:
            InputError: the model does not exist, is damaged or not supported, fp32 is requested of an int8 folder,
                or an argument is out of range.
            ImportError: the native extension was not built.
        """
        _check_built()
        if precision not in ("int8", "fp32"):
            raise InputError(f"precision is {precision!r}, wanted 'int8' or 'fp32'")
        if not isinstance(path_or_id, (str, os.PathLike)):
            raise InputError(f"path_or_id is {type(path_or_id).__name__}, wanted a folder's path or a hub id")
        chosen = choose_threads(threads)
        settings: dict[str, Any] = {
            "precision": precision,
            "threads": chosen,
            "lanes": check_lanes(lanes, chosen.count),
            "isa": choose_isa(isa),
            "wanted_isa": isa,
        }
        folder = local_folder(path_or_id)
        own = is_there(folder / MANIFEST)
        if not own or (not is_packed(folder) and whole_or_shards(folder, "model.safetensors")):  # of something else
            return cls(convert(folder, precision), **settings)
        packed = read(folder)
        if packed.precision == "int8" and precision == "fp32":
            raise InputError(
                f"{folder}: packed as int8, but precision='fp32' was requested; omit it, "
                "or pack the original folder with --precision fp32"
            )
        if packed.precision != precision:
            notice(f"{folder}: packed in fp32, computed in int8; precision='fp32' (--precision fp32) keeps float32")
            packed = _quantized(packed)
        return cls(packed, **settings)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the folder's path and the settings: the other process loads the model again."""
        return functools.partial(type(self).from_pretrained, str(self._folder), **self._settings), ()

    def plan(self, lengths: Sequence[int]) -> Plan:
        """How sequences of so many tokens each are divided among threads that this process may use now."""
        return plan(lengths, min(self.threads, usable_threads(self._quota)), self.lanes, self._meeting)

    @staticmethod
    def available_isas() -> list[str]:
        """Kernels that this CPU and operating system can run, fastest last.

        x86-64: scalar, avx2, avxvnni, avx512vnni, avx512bf16, amx. ARM: scalar, neon, neon_i8mm.
        """
        return list(native.available_isas()) if native else []

    def choices(self) -> list[tuple[str, str]]:
        """(name, storage layout of its weight and the reason for it) of every linear layer of the encoder."""
        return list(self._encoder.choices())

    def encode(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
    ) -> NDArray[np.float32]:
        """Hidden states of the last layer for a batch of token ids; padded positions are not computed.

        Args:
            input_ids: (batch, seq) integers.
            attention_mask: (batch, seq) integers or bool: 1 for the tokens of each row, then 0 for its padding;
                gaps and padding on the left are an error. None: no padding.
            token_type_ids: (batch, seq) integers; None: all 0.

        Returns:
            (batch, seq, hidden) float32, 0 at padded positions.

        Raises:
            InputError: an array of the wrong shape, type or range, an empty batch, a row that is too long, or a result
                that is NaN or infinite.
        """
        ids = as_matrix(input_ids, "input_ids")
        lengths = row_lengths(attention_mask, ids.shape)
        types = None if token_type_ids is None else as_matrix(token_type_ids, "token_type_ids", ids.shape)
        sequences = self.checked_ids(
            [ids[row, :length] for row, length in enumerate(lengths)],
            None if types is None else [types[row, :length] for row, length in enumerate(lengths)],
        )
        result = np.zeros((*ids.shape, self._architecture.hidden), np.float32)
        for row, hidden in self.hidden(sequences):
            result[row, : len(hidden)] = hidden
        return result

    def predict(self, x: Any, *, batch_size: int = 32, truncate: bool = False) -> Any:
        """Run the model's task on one text or a list of texts.

        Args:
            x: a str, or a pair (a, b) of them; for question answering {"question": str, "context": str}; or a
                list of these. A masked-LM needs its mask token in every text.
            batch_size: number of texts that are tokenized and kept in memory at a time. It does not affect results:
                with one `isa` and `precision` a text gets the same bits in any batch and with any number of threads.
            truncate: truncate texts (and questions) that are too long for the model instead of raising. Contexts
                of question answering are always cut into overlapping windows.

        Returns:
            A list of results in the order of `x` if that is a list, otherwise one result:
            classification: {"label", "score", "scores": {label: score}};
            question answering: {"answer", "start", "end", "score"}, by characters of the context: the span with the
                largest sum of start and end logit over all windows, as in the official SQuAD script; its score, 0 to
                1, is the probability of the start times that of the end, over the context's tokens of all windows;
            token classification: a list of {"label", "score", "word", "start", "end"}, one per token;
            masked-LM: a list of {"label", "score", "scores": {token: score}}, one per mask;
            embedding: a float32 vector (hidden,), for a list a matrix (texts, hidden); fewer columns if the folder
                has a truncate_dim.

        Raises:
            InputError: a text of the wrong type, empty or too long, or an input that the task does not accept.
        """
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}, wanted an integer of at least 1")
        if isinstance(x, list):
            if not x:
                raise InputError(f"x is an empty list, {WANTED}; call predict only with texts")
            items, names = x, [f"x[{index}]" for index in range(len(x))]
        else:
            items, names = [x], ["x"]
        texts = [check_item(item, name, self.task) for item, name in zip(items, names, strict=True)]
        results: list[Any] = []
        for begin in range(0, len(texts), batch_size):
            part = slice(begin, begin + batch_size)
            results += self._predict(texts[part], names[part], truncate)
        if not isinstance(x, list):
            return results[0]
        return np.stack(results) if self.task == "embedding" else results

    def logits(
        self, input_ids: Sequence[ArrayLike], token_type_ids: Sequence[ArrayLike] | None = None
    ) -> list[NDArray[np.float32]]:
        """The outputs of the task head before softmax, for sequences that are already tokenized.

        Args:
            input_ids: integer ids (tokens,) of each sequence, including special tokens, without padding.
            token_type_ids: integers (tokens,) of each sequence; None: all 0. A model without token types ignores them.

        Returns:
            A float32 array for each sequence, in order: (classes,) for classification, (tokens, 2) start and end logits
            for question answering.

        Raises:
            InputError: the model has another task, an array has the wrong shape, dtype or range, or a sequence is empty
                or longer than `max_length`.
        """
        head = self.head
        if not isinstance(head, Classification | QuestionAnswering):
            raise InputError(
                f"the model's task is {self.task}, but logits needs classification or question answering; use predict"
            )
        if len(input_ids) == 0:
            return []
        ids = [as_row(row, f"input_ids[{index}]") for index, row in enumerate(input_ids)]
        types = None
        if self._architecture.types > 1 and token_type_ids is not None:
            if len(token_type_ids) != len(ids):
                raise InputError(f"token_type_ids has {len(token_type_ids)} sequences, input_ids {len(ids)}; give both")
            types = [
                as_row(row, f"token_type_ids[{index}]", ids[index].shape) for index, row in enumerate(token_type_ids)
            ]
        return list(head.logits(self._reduced(self.checked_ids(ids, types))))

    def _predict(self, texts: Sequence[Any], names: Sequence[str], truncate: bool) -> list[Any]:
        tokens = self.head.prepare(self.tokenizer, texts, names, truncate=truncate)
        return self.head.results(self._reduced(tokens), tokens, texts)

    def checked_ids(
        self, input_ids: Sequence[NDArray[Any]], token_type_ids: Sequence[NDArray[Any]] | None
    ) -> list[Tokens]:
        """Check rows (tokens,) of integers and convert them to the input of the encoder. Raises InputError."""
        check_range(input_ids, self._vocabulary, "input_ids", "the vocabulary size is")
        if token_type_ids is None:
            token_type_ids = [np.zeros(len(ids), np.int32) for ids in input_ids]
        check_range(token_type_ids, max(self._architecture.types, 1), "token_type_ids", "the number of token types is")
        for row, ids in enumerate(input_ids):
            if len(ids) > self.max_length:
                raise InputError(
                    f"input_ids: row {row} has {len(ids)} tokens, the model takes at most {self.max_length}; "
                    "cut the row"
                )
        return [
            Tokens(ids.astype(np.int32), types.astype(np.int32))
            for ids, types in zip(input_ids, token_type_ids, strict=True)
        ]

    def _reduced(self, sequences: Sequence[Tokens]) -> list[NDArray[np.float32]]:
        """The output of the head's `reduce` for each sequence, in order."""
        reduced = {index: self.head.reduce(hidden, sequences[index]) for index, hidden in self.hidden(sequences)}
        results = [reduced[index] for index in range(len(sequences))]
        if not np.isfinite(np.concatenate(results, axis=None)).all():
            for index, one in enumerate(results):
                finite(one, f"sequence {index} of the batch")
        return results

    def hidden(self, sequences: Sequence[Tokens]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield (index, hidden states (tokens, hidden)) of every sequence, in the order they are computed.

        The sequences come from `tokenizer`, or from `checked_ids`. Raises InputError where a state of any token is NaN
        or infinite: in int8, attention to such a token can give the others finite states, which are wrong.
        """
        lengths = [len(sequence.ids) for sequence in sequences]
        for group in groups(lengths):
            made = self.plan([lengths[index] for index in group])
            parts = [[group[position] for position in part] for part in made.parts]
            while parts:  # forward returns from time to time, so that Python can handle signals
                order = [index for part in parts for index in part]
                bounds = list(accumulate((lengths[index] for index in order), initial=0))
                part_bounds = list(accumulate(map(len, parts), initial=0))
                hidden = self._encoder.forward(
                    np.concatenate([sequences[index].ids for index in order]),
                    np.concatenate([self._architecture.positions(sequences[index].ids) for index in order]),
                    np.concatenate([sequences[index].types for index in order]),
                    np.array(bounds, np.int32),
                    parts=np.array(part_bounds, np.int32),
                    lanes=made.lanes,
                    width=made.width,
                )
                done = [bounds[end] for end in part_bounds].index(len(hidden))
                for position in range(part_bounds[done]):
                    states = hidden[bounds[position] : bounds[position + 1]]
                    yield order[position], finite(states, f"sequence {order[position]} of the batch")
                parts = parts[done:]


def _quantized(packed: Packed) -> Packed:
    """Quantize a model packed as fp32 to int8, tensor by tensor, so that memory never holds both copies."""
    linears, embeddings = packed.linears, packed.embeddings
    return dataclasses.replace(
        packed,
        precision="int8",
        linears={name: pack_linear(linears.pop(name).dense(), "int8") for name in list(linears)},
        embeddings={name: PackedEmbedding(*quantize_weight(embeddings.pop(name).values)) for name in list(embeddings)},
    )


def _check_built() -> None:
    if native is None:
        raise ImportError(f"the native extension of pruneofa is missing ({_not_built}); build it with: pip install .")


def choose_isa(wanted: str | None) -> str:
    """`wanted` if this CPU supports it; if None, PRUNEOFA_ISA if set, else the fastest supported one.

    Raises InputError for one that is not supported, and ImportError if the extension was not built.
    """
    _check_built()
    available = native.available_isas()
    source = "isa" if wanted is not None else "PRUNEOFA_ISA"
    wanted = wanted if wanted is not None else os.environ.get("PRUNEOFA_ISA") or available[-1]
    if wanted not in available:
        raise InputError(f"{source} is {wanted!r}, which this CPU does not run; wanted one of {', '.join(available)}")
    return wanted
