"""The tokenizer of a model folder: loaded from ``tokenizer.json``, and copied to artifacts and exports unchanged.

transformers 5 rebuilds some tokenizers from the class in ``tokenizer_config.json`` and silently ignores the
pre-tokenizer of ``tokenizer.json`` (SmolLM2, published as ``GPT2Tokenizer``, loses its splitting of digits). So
``tokenizer.json`` is loaded by the ``tokenizers`` library, and ``tokenizer_config.json`` is used only for special
tokens and chat templates.

A folder without ``tokenizer.json`` is converted by transformers, except for tokenizers that need code from the model
folder, which flatq does not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatq.errors import RecipeError
from flatq.files import lfs_pointer, read_json, write_atomically, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER, SETTINGS, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
GENERATION = "generation_config.json"
VOCABULARY, MERGES, PIECES = "vocab.json", "merges.txt", "tokenizer.model"
# Each of these sets of files defines a tokenizer.
SETS = ((TOKENIZER,), (VOCABULARY, MERGES), (PIECES,))
COMPANIONS = (
    TOKENIZER, SETTINGS, SPECIAL, "added_tokens.json", PIECES, VOCABULARY, MERGES, "tekken.json",
    TEMPLATE, "chat_template.json", GENERATION,
)  # fmt: skip
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
FAST = "PreTrainedTokenizerFast"  # class that loads tokenizer.json unchanged in transformers 4 and 5
FROM_THE_SOURCE = "get it again from where the model came from"


def companions(root: Path) -> list[Path]:
    """The files of a folder that are neither weights nor configuration: tokenizer, templates, generation settings."""
    found = [root / name for name in COMPANIONS if (root / name).is_file()]
    return found + sorted((root / TEMPLATES).glob("*.jinja"))


def has_tokenizer(root: Path) -> bool:
    """Whether a folder has one of the sets of files that define a tokenizer."""
    return any(all((root / name).is_file() for name in names) for names in SETS)


def open_tokenizer(root: Path) -> Any:
    """The tokenizer of a folder as a ``PreTrainedTokenizerFast``; its backend is ``tokenizer.json``, unchanged.

    Special tokens that ``tokenizer.json`` does not know stay unset. Of several chat templates the one named
    ``default`` is set.

    Raises:
        RecipeError: the files are missing, damaged or need code of the model folder; one line with a remedy.
    """
    settings, templates = _settings(root), chat_templates(root)
    _read(root / GENERATION)  # read by others later, refused here
    bare = _bare(root / TOKENIZER) if (root / TOKENIZER).is_file() else _converted(root, settings)
    bare.no_truncation()  # a setting of someone's training run, and texts here are long
    bare.no_padding()
    from transformers import PreTrainedTokenizerFast

    named = {name: piece for name in NAMED if (piece := _content(settings, name, root)) is not None}
    known = {name: piece for name, piece in named.items() if bare.token_to_id(piece) is not None}
    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, chat_template=templates.get("default"), **known)
    except Exception as damaged:  # it copies the tokenizer through its text
        raise RecipeError(
            f"model: {root / TOKENIZER}: its parts contradict each other ({_first_line(damaged)}); {FROM_THE_SOURCE}"
        ) from damaged
    tokenizer._tokenizer = bare  # the constructor adds and patches; the file is right
    return tokenizer


def chat_templates(root: Path) -> dict[str, str]:
    """Every chat template of a folder by its name; a single one is called ``default``.

    Files (``chat_template.jinja``, ``additional_chat_templates/NAME.jinja``) count before ``tokenizer_config.json``,
    as in transformers.

    Raises:
        RecipeError: a file is damaged.
    """
    files = {"default": root / TEMPLATE} | {path.stem: path for path in sorted((root / TEMPLATES).glob("*.jinja"))}
    found = {name: _text(path) for name, path in files.items() if path.is_file()}
    if found:
        return found
    stated = _settings(root).get("chat_template")
    if stated is None:
        return {}
    if isinstance(stated, str):
        return {"default": stated}
    named: dict[str, str] = {}
    for entry in stated if isinstance(stated, list) else [stated]:
        name, template = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise RecipeError(
                f"model: {root / SETTINGS}: chat_template is neither a text nor a list of templates with name and "
                f"template; {FROM_THE_SOURCE}"
            )
        named[name] = template
    return named


def generation_settings(root: Path) -> dict[str, Any]:
    """``generation_config.json`` of a folder; empty if there is none.

    Raises:
        RecipeError: it is damaged.
    """
    return _read(root / GENERATION)


def end_tokens(settings: Mapping[str, Any]) -> frozenset[int]:
    """Ids at which a model stops, of ``eos_token_id``: one id, a list of ids, or nothing.

    Raises:
        RecipeError: it is something else.
    """
    stated = settings.get("eos_token_id")
    ids = [token for token in (stated if isinstance(stated, list) else [stated]) if token is not None]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise RecipeError(f"model: eos_token_id is {stated!r:.80}; a token id or a list of token ids is expected")
    return frozenset(ids)


def carry(root: Path, out: Path, tokenizer: Any = None) -> None:
    """Copy tokenizer, templates and generation settings byte for byte into another folder.

    Args:
        root: a folder that ``open_tokenizer`` opened.
        out: where to.
        tokenizer: what ``open_tokenizer`` gave; its ``tokenizer.json`` is written if ``root`` has none.
    """
    for path in companions(root):
        _copy(path, root, out)
    if tokenizer is not None and not (out / TOKENIZER).exists():
        save(tokenizer, out)


def deliver_companions(root: Path, out: Path, files: Sequence[Path] | None = None) -> tuple[list[Path], list[str]]:
    """Copy tokenizer, templates and generation settings into an export; returns the files and every change.

    A file is changed only if a reader could not open it: settings that only transformers 5 supports, and settings that
    need code which is not in the folder.
    """
    written, changes = list[Path](), list[str]()
    for path in companions(root) if files is None else files:
        settings, changed = _readable(_read(path)) if path.name == SETTINGS else ({}, [])
        if changed:
            write_json(out / SETTINGS, settings)
            changes += [f"{SETTINGS}: {words}" for words in changed]
            written.append(out / SETTINGS)
        else:
            written.append(_copy(path, root, out))
    return written, changes


def save(tokenizer: Any, out: Path) -> None:
    """Write a tokenizer without a folder in a format for transformers 4 and 5; existing files are kept."""
    tokenizer.backend_tokenizer.save(str(out / TOKENIZER))
    if not (out / SETTINGS).exists():
        named = {name: str(piece) for name in NAMED if (piece := getattr(tokenizer, name)) is not None}
        write_json(out / SETTINGS, {"tokenizer_class": FAST, **named, "clean_up_tokenization_spaces": False})
    if isinstance(tokenizer.chat_template, str) and not chat_templates(out):
        write_atomically(out / TEMPLATE, tokenizer.chat_template.encode())


def beyond(tokenizer: Any, rows: int) -> dict[int, str]:
    """Tokens whose id has no row in an embedding of so many rows, by id, ascending."""
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    return dict(sorted((number, token) for token, number in vocabulary.items() if number >= rows))


def notes(root: Path) -> list[str]:
    """Notes about changes of these files in exports, see ``deliver_companions``; usually none."""
    return [f"{SETTINGS}: in exports {words}" for words in _readable(_read(root / SETTINGS))[1]]


def _readable(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings in a form that every reader supports, and a description of each change."""
    changed, changes = dict(settings), list[str]()
    kind, code = settings.get("tokenizer_class"), settings.get("auto_map")
    if code is not None:
        del changed["auto_map"]
        changes.append(
            f"auto_map is removed and tokenizer_class {kind} is {FAST}, because the code is not in this folder"
        )
    if kind == "TokenizersBackend":
        changes.append(f"tokenizer_class TokenizersBackend, which transformers 4 does not know, is {FAST}")
    if code is not None or kind == "TokenizersBackend":
        changed["tokenizer_class"] = FAST
    if isinstance(extra := settings.get("extra_special_tokens"), list):
        del changed["extra_special_tokens"]
        changed.setdefault("additional_special_tokens", extra)
        changes.append(
            "the list extra_special_tokens, which transformers 4 does not read, is additional_special_tokens"
        )
    return changed, changes


def _converted(root: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer converted by transformers from older file formats."""
    add = "add tokenizer.json from where the model came from"
    if isinstance(settings.get("auto_map"), dict) and "AutoTokenizer" in settings["auto_map"]:
        raise RecipeError(
            f"model: {root}: its tokenizer needs code of the model folder, which flatq does not run; {add}"
        )
    if not has_tokenizer(root):
        raise RecipeError(
            f"model: {root} has no tokenizer; add tokenizer.json and tokenizer_config.json "
            "(or tokenizer.model, or vocab.json with merges.txt) from where the model came from"
        )
    place = root / (PIECES if not (root / VOCABULARY).is_file() else VOCABULARY)
    _refuse_pointer(place)
    if place.name == PIECES and find_spec("sentencepiece") is None:
        raise RecipeError(
            f"model: {place}: reading it needs the package sentencepiece; run pip install sentencepiece, or {add}"
        )
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    except Exception as failed:  # the libraries raise various exceptions
        raise RecipeError(f"model: {place}: transformers cannot open it ({_first_line(failed)}); {add}") from failed
    bare: Tokenizer | None = getattr(made, "backend_tokenizer", None)
    if bare is None:
        raise RecipeError(f"model: {root}: {type(made).__name__} is not written in the tokenizers library; {add}")
    return bare


def _bare(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    _refuse_pointer(path)
    try:
        return Tokenizer.from_str(_text(path))
    except RecipeError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as damaged:  # the library raises Exception itself, and a panic of Rust is none
        raise RecipeError(
            f"model: {path}: damaged, or not of the tokenizers library ({_first_line(damaged)}); {FROM_THE_SOURCE}"
        ) from damaged


def _content(settings: Mapping[str, Any], name: str, root: Path) -> str | None:
    stated = settings.get(name)
    content = stated.get("content") if isinstance(stated, dict) else stated
    if content is not None and not isinstance(content, str):
        raise RecipeError(f"model: {root / SETTINGS}: {name} is {stated!r}; a text is expected; {FROM_THE_SOURCE}")
    return content


def _settings(root: Path) -> dict[str, Any]:
    """``tokenizer_config.json``, and below it the older ``special_tokens_map.json``."""
    stated = {key: value for key, value in _read(root / SETTINGS).items() if value is not None}
    return {**_read(root / SPECIAL), **stated}


def _read(path: Path) -> dict[str, Any]:
    """An object of JSON; empty if the file is not there."""
    return read_json(path, dict[str, Any], FROM_THE_SOURCE, error=RecipeError) if path.is_file() else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failed:
        raise RecipeError(f"model: {path}: not readable as UTF-8 ({failed}); {FROM_THE_SOURCE}") from failed


def _refuse_pointer(path: Path) -> None:
    if lfs_pointer(path):
        raise RecipeError(f"model: {path}: a Git LFS pointer, not the file itself; run git lfs pull in its folder")


def _first_line(failed: BaseException) -> str:
    return next(iter(str(failed).strip().splitlines()), type(failed).__name__)


def _copy(path: Path, root: Path, out: Path) -> Path:
    copied = out / path.relative_to(root)
    copied.parent.mkdir(exist_ok=True)
    write_atomically(copied, path.read_bytes())
    return copied
