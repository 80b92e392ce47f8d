"""Whether a tokenizer of transformers gives the tokens that the engine gives by tokenizer.json."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from pruneofa.errors import InputError, short
from pruneofa.formats.tokenizer_file import explained
from pruneofa.formats.tokenizer_settings import SAVE_AGAIN

# Case, accents, digits, blanks, scripts: what normalizers and pre-tokenizers treat in ways of their own.
_TEXTS = (
    "Hello WORLD",
    "Caf\u00e9 na\u00efve \u00dcber",
    "0123 4.5%, don't",
    "  two blanks\tand a tab",
    "\u65e5\u672c\u8a9e text",
)
_PAIR = ("One text.", "Another one")


def check_same_tokens(tokenizer: PreTrainedTokenizerBase, file: Path, engines: Tokenizer) -> None:
    """Compare the ids of some texts, of each special token and of a pair, and its token types if `tokenizer` gives any.

    `engines` is `file`, the tokenizer.json; its truncation and padding are switched off, as in the engine.

    Raises InputError with the first difference.
    """
    engines.no_truncation()
    engines.no_padding()
    backend: Tokenizer = tokenizer.backend_tokenizer
    added = {token.content for each in (backend, engines) for token in each.get_added_tokens_decoder().values()}
    texts = [*_TEXTS, *(f"the {token} city" for token in sorted({*added, *tokenizer.all_special_tokens}))]
    with explained(file):
        theirs, pair = tokenizer(texts)["input_ids"], tokenizer(*_PAIR)
        ours, our_pair = engines.encode_batch(texts), engines.encode(*_PAIR)
    for text, wanted, got in zip(texts, theirs, ours, strict=True):
        _same(file, f"the ids of {short(text)}", got.ids, wanted)
    _same(file, f"the ids of the pair {short(_PAIR)}", our_pair.ids, pair["input_ids"])
    if "token_type_ids" in pair:
        _same(file, f"the token types of the pair {short(_PAIR)}", our_pair.type_ids, pair["token_type_ids"])


def _same(file: Path, what: str, got: Any, wanted: Any) -> None:
    if got != wanted:
        raise InputError(
            f"{file}: {what} are {short(got)}, by which the engine runs, wanted {short(wanted)}, which transformers "
            f"gives by tokenizer_config.json; {SAVE_AGAIN}"
        )
