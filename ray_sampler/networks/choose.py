"""Where in a checkpoint the weights are, and by what names: the search through the layouts that people save."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_sampler.networks.formats import Entry, Odd, Stored
from ray_sampler.networks.inert import Foreign, Refused
from ray_sampler.networks.unnamed import names_of

EMA = ("ema", "model_ema", "ema_model", "ema_state_dict", "model_ema_state_dict", "state_dict_ema", "params_ema")
PLAIN = ("state_dict", "model", "module", "model_state_dict", "net", "network", "params")
"""Keys under which weights are looked for, in this order; then come the top level, and a key of any other name."""

STATES = ("callbacks", "optimizer_states")
"""Keys of Lightning's checkpoints that hold the states of its callbacks and of optimizers, in which averages can be."""

AVERAGE = re.compile(r"(?<![a-z])(emas?|averaged?|avg|swa|polyak|shadow)(?![a-z])|EMA")
"""In the other names that people give to an average: net_ema, ema_0.9999, EMA, averaged_model, swa_model. The last word
is of those who keep it beside the model, and of diffusers' EMAModel."""

EMA_PARTS = ("ema", "model_ema", "ema_model")
MODEL_PARTS = ("state_dict", "model", "module", "_orig_mod")
"""Beginnings of names, before a dot, that make a part of a state dict where there are other names too."""

WRAPPERS = frozenset(
    (
        *("module", "_orig_mod", "_forward_module", "state_dict", "model", "ema_model", "ema", "model_ema"),
        *("net", "network", "denoiser", "diffusion_model", "unet"),
    )
)
"""Beginnings of names that say nothing where all names have them."""

FIRST = ("input_blocks.0.0.weight", "x_embedder.proj.weight", "unet.emb_fourier.freqs")
"""A name in every ADM network, one in every DiT, and one in every network of EDM2."""

INFIX = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
EXTRAS = ("num_updates", "decay", "n_averaged", "initted", "step", "optimization_step", "global_step")
"""Extra entries among the weights of an average."""

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
SHADOW = "shadow_params"
SHARDS = ("ShardedTensor", "DTensor", "FlatParameter")
"""Classes of tensors of which each process has a part."""
PERSISTENT = "persistence._reconstruct_persistent_obj"
SAVE = "save its state dict alone, with torch.save(model.state_dict(), ...)"
MAX_DEPTH = 4
LEAST = 8
"""Tensors under a name that is not known; with fewer it is not a network, but figures of its training."""
LISTED = 8

Tensors = dict[str, Entry]


class WrongKey(ValueError):
    """The user's key names no weights. The message is what follows "--weights_key is KEY; "."""


@dataclass(frozen=True)
class Part:
    """The weights that were chosen."""

    key: str
    """Where in the file they are; "" is the top level."""
    tensors: Tensors
    """By canonical name."""
    others: tuple[str, ...]
    """Keys of other weights in the file."""
    obvious: bool = True
    """Whether the key is one that is looked for."""


def choose(content: Any, key: str | None) -> Part:
    """The weights of a checkpoint's content, with the prefixes of their names removed.

    Args:
        content: as `formats.content_of` reads it.
        key: where they are, with dots, or None to search.

    Raises:
        Refused: there are none; says what is there instead.
        WrongKey: there are none under `key`.
    """
    nameless = None
    try:
        found = list(_candidates(content))
    except Refused as error:
        if key is None:
            raise
        found, nameless = [], error
    keys = list(dict.fromkeys(candidate for path, tensors in found for candidate in (path, *_parts(path, tensors))))
    if key is not None:
        if (chosen := _at(content, key, found)) is not None:
            return _named(key, chosen, keys)
        if nameless:
            raise nameless
        if found:
            raise WrongKey(f"the file has weights under {', '.join(map(listed, keys[:LISTED])) or 'no key'}")
    if not found:
        _refuse(content)
    path, tensors = found[0]
    items = _mapping(content) or {}
    taken = next((name for name in _sought(items) if f"{path}.".startswith(f"{name}.")), None)
    for name in _sought(items):
        if name == taken:
            break
        _require_data(items.get(name), name, keys)
    obvious = path == "" or taken is not None
    if not obvious and len(found) > 1:
        raise Refused(f"it has weights under {', '.join(map(listed, keys[:LISTED]))}; --weights_key chooses")
    return replace(_named(path, tensors, keys), obvious=obvious)


def listed(key: str) -> str:
    """A key of the file as a message shows it."""
    return f"{ascii(key)[:80]}" if key else "the top level"


def _mapping(value: Any) -> dict[Any, Any] | None:
    """What a dictionary, or an object of a class derived from it, holds; numeric keys also as text."""
    items = value.items or None if isinstance(value, Foreign) else value
    if not isinstance(items, dict):
        return None
    numbers = [key for key, each in items.items() if type(key) in (int, float) and not isinstance(each, Stored | Odd)]
    return items | {str(key): items[key] for key in numbers} if numbers else items


def _tensors(value: Any) -> Tensors:
    """The tensors directly in a dictionary."""
    items = ((name, _entry(v)) for name, v in (_mapping(value) or {}).items() if isinstance(name, str))
    return {name: entry for name, entry in items if entry is not None}


def _entry(value: Any) -> Entry | None:
    if isinstance(value, Foreign) and value.name.endswith(SHARDS):
        return Odd("one part of a sharded tensor")
    return value if isinstance(value, Stored | Odd) else None


def _weights(value: Any) -> Tensors:
    """The tensors directly in a dictionary, if they are more than some counters."""
    tensors = _tensors(value)
    return tensors if any(name not in EXTRAS for name in tensors) else {}


def _candidates(
    root: Any, path: str = "", depth: int = 0, seen: set[int] | None = None
) -> Iterator[tuple[str, Tensors]]:
    """Keys and state dicts, in the order in which they are preferred."""
    items = _mapping(root)
    seen = set() if seen is None else seen  # of dictionaries, which may hold themselves
    if items is None or depth >= MAX_DEPTH or "param_groups" in items or id(root) in seen:
        return
    seen.add(id(root))
    found = set()
    for name in _sought(items):
        if name in items:
            inside = _in_states if name in STATES else _under
            for candidate in inside(items, name, path, depth, seen):
                if name in EMA + PLAIN or len(candidate[1]) >= LEAST:
                    found.add(name)
                    yield candidate
    if _weights(root) and (not found or len(_weights(root)) > 1):
        yield path, _tensors(root)
        found.add("")
    others = [name for name in items if isinstance(name, str) and _is_network(name, items[name])]
    if depth == 0 or (not found and (len(others) == 1 or AVERAGE.search(path))):
        for name in others:
            if name not in found:
                yield f"{path}.{name}" if path else name, _tensors(items[name])
    if depth == 0 and not found and not others:
        for name in items:
            if isinstance(name, str) and not _is_optimizer(name, items[name]):
                yield from _candidates(items[name], name, 1, seen)


def _sought(items: Mapping[Any, Any]) -> list[str]:
    """Keys under which weights are looked for, averages first."""
    return [*EMA, *(name for name in _averages(items) if name not in EMA), *STATES, *PLAIN]


def _averages(items: Iterable[Any]) -> list[str]:
    """The keys that are names of averages."""
    return [name for name in items if isinstance(name, str) and AVERAGE.search(name) and "optim" not in name]


def _is_network(key: str, value: Any) -> bool:
    """Whether something under a name that is not looked for can be weights."""
    return not isinstance(value, Stored | Odd) and not _is_optimizer(key, value) and len(_weights(value)) >= LEAST


def _in_states(
    items: dict[Any, Any], name: str, path: str, depth: int, seen: set[int]
) -> Iterator[tuple[str, Tensors]]:
    """Averages in the states of callbacks, by the callbacks' names, or of optimizers, which are a list."""
    states = items[name]
    beside = {plain: items[plain] for plain in PLAIN if plain in items}
    named = enumerate(states) if isinstance(states, list) else (_mapping(states) or {}).items()
    for key, value in named:
        state = _mapping(value) or {}
        for average in _averages(state):
            inside = f"{path}.{name}.{key}" if path else f"{name}.{key}"
            yield from _under({**beside, average: state[average]}, average, inside, depth + 2, seen)


def _under(items: dict[Any, Any], name: str, path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensors]]:
    value = items[name]
    inside = f"{path}.{name}" if path else name
    shadow = value if isinstance(value, list | tuple) else (_mapping(value) or {}).get(SHADOW)
    if isinstance(shadow, list | tuple) and shadow and all(isinstance(item, Stored | Odd) for item in shadow):
        yield inside, _shadow(shadow, items, inside)
    elif isinstance(value, list | tuple):  # of averages, as EDM2 keeps them in the state of its training
        each_once = () if id(value) in seen else value
        seen.add(id(value))
        for number, each in enumerate(each_once):
            yield from _candidates(each, f"{inside}.{number}", depth + 1, seen)
    elif not isinstance(value, Foreign) or value.items:
        yield from _candidates(value, inside, depth + 1, seen)


def _shadow(averages: Sequence[Entry], items: dict[Any, Any], key: str) -> Tensors:
    """Averages without names, in the order of parameters: by the names of the state dict beside, else by shapes."""
    others = [name for name in items if isinstance(name, str) and _is_network(name, items[name])]
    names = [name for name in (*PLAIN, *others) if name in items and not AVERAGE.search(name)]
    there, beside = next((c for name in names for c in _candidates({name: items[name]})), ("", {}))
    every = len(averages) == len(beside)  # buffers among them, as some callbacks of Lightning keep them
    model = {n: t for n, t in beside.items() if isinstance(t, Stored) and (every or not n.endswith(BUFFERS))}
    shapes = [t.like.shape if isinstance(t, Stored) else () for t in averages]
    first = _in_order(list(model), [t.like.shape for t in model.values()], shapes)
    # From the end the same: what is left out is left out for certain.
    last = _in_order(list(model)[::-1], [t.like.shape for t in model.values()][::-1], shapes[::-1])
    if not model:
        known = names_of(shapes)
        if known is None:
            raise Refused(
                f"it has averaged weights under {key!r} as a list without names, no state dict beside it to name them, "
                "and not in the order of a known network; load them into your model and save its state dict"
            )
        return dict(zip(known, averages, strict=True))
    if first is None or last is None or first != last[::-1]:
        raise Refused(
            f"it has averaged weights under {key!r} as a list without names, which the state dict beside it does not "
            "determine; load them into your model and save its state dict, or take other weights with "
            f"--weights_key {there}"
        )
    return {**beside, **dict(zip(first, averages, strict=True))}


def _in_order(
    names: list[str], shapes: Sequence[tuple[int, ...]], wanted: Sequence[tuple[int, ...]]
) -> list[str] | None:
    """The first names, in order, with the wanted shapes."""
    chosen: list[str] = []
    for name, shape in zip(names, shapes, strict=True):
        if len(chosen) < len(wanted) and shape == wanted[len(chosen)]:
            chosen.append(name)
    return chosen if len(chosen) == len(wanted) else None


def _at(root: Any, key: str, found: list[tuple[str, Tensors]]) -> Tensors | None:
    """The state dict under a dotted key, whose names may have dots themselves."""
    for path, tensors in found:
        if path == key:
            return tensors
    value, rest = root, key
    while rest:
        items = _mapping(value) or {}
        names = [name for name in items if isinstance(name, str) and (rest == name or rest.startswith(f"{name}."))]
        if not names:
            break
        name = max(names, key=len)
        value, rest = items[name], rest[len(name) + 1 :]
    if not rest:
        _require_data(value, key, [path for path, _ in found])
        if _weights(value):
            return _tensors(value)
        return next((tensors for _, tensors in _candidates(value)), None)
    states = [_tensors(value)] if value is not root or _weights(root) else []
    for tensors in (*states, *(tensors for _, tensors in found)):
        part = _part(tensors, rest)
        if part:
            return part
    return None


def _parts(path: str, tensors: Iterable[str]) -> list[str]:
    """Keys of the parts of a state dict that names separate."""
    heads = {name.partition(".")[0] for name in tensors if "." in name}
    return [f"{path}.{head}" if path else head for head in _heads_of_parts(tensors, heads)] if len(heads) > 1 else []


def _part(tensors: Tensors, head: str) -> Tensors:
    """The tensors whose names begin with `head` and a dot, without it; those of an EMA by the names of the model."""
    begin = f"{head}."
    part = {name[len(begin) :]: t for name, t in tensors.items() if name.startswith(begin)}
    weights = {name: t for name, t in part.items() if name not in EXTRAS}
    if not weights or any("." in name for name in weights):
        return weights
    # Lightning's LitEma keeps its averages by the names of the model's parameters without their dots.
    groups: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = tensor
    for group, beside in groups.items():
        flat: dict[str, list[str]] = {}
        for name in beside:
            flat.setdefault(name.replace(".", ""), []).append(name)
        if group != head and all(name in flat for name in weights):
            if any(len(flat[name]) > 1 for name in weights):
                raise Refused(
                    f"it has averages under {listed(head)} by names without dots, of which some can be two tensors; "
                    f"take other weights with --weights_key {group}"
                )
            return beside | {flat[name][0]: tensor for name, tensor in weights.items()}
    return weights


def _named(path: str, tensors: Tensors, keys: list[str]) -> Part:
    """`tensors` by canonical name, and where they are."""
    taken: tuple[str, ...] = ()
    for _ in range(3 * MAX_DEPTH):
        tensors = {name: t for name, t in tensors.items() if name not in EXTRAS}
        clean = {INFIX.sub("", name): t for name, t in tensors.items()}
        if len(clean) == len(tensors):
            tensors = clean
        heads = {name.partition(".")[0] for name in tensors if "." in name}
        heads |= {"" for name in tensors if "." not in name}
        if len(heads) == 1 and heads <= WRAPPERS and "unet.emb_fourier.freqs" not in tensors:
            tensors = _part(tensors, next(iter(heads)))
            continue
        parts = _heads_of_parts(tensors, heads)
        if not parts:
            break
        tensors, taken = _part(tensors, parts[0]), (*taken, parts[0])
    key = ".".join([*([path] if path else []), *taken])
    return Part(key, tensors, tuple(k for k in keys if k != path and not f"{key}.".startswith(f"{k}.")))


def _heads_of_parts(tensors: Iterable[str], heads: set[str]) -> list[str]:
    """Beginnings of names, before a dot, that make a part of a state dict, averages first.

    Beside those that are known, they are those under which a known network is: attributes of somebody's own class.
    """
    networks = [name.removesuffix(f".{first}") for name in tensors for first in FIRST if name.endswith(f".{first}")]
    averages = [head for head in networks if AVERAGE.search(head)]
    averages += [head for head in sorted(heads) if AVERAGE.search(head) and heads & {*MODEL_PARTS}]
    ordered = (
        *(head for head in EMA_PARTS if head in heads),
        *averages,
        *(head for head in MODEL_PARTS if head in heads),
        *networks,
    )
    parts: list[str] = []
    for head in ordered:
        if not any(f"{head}.".startswith(f"{part}.") for part in parts):
            parts.append(head)
    return parts


def _refuse(content: Any) -> None:
    """Say what the file holds in place of weights."""
    items = _mapping(content)
    for key, value in (("", content), *((items or {}).items())):
        _require_data(value, key, [])
    if isinstance(content, Foreign):
        raise Refused(f"it holds an object of {_class(content)}, whose code is not executed; {SAVE}")
    if _is_optimizer("", content) or any(_is_optimizer(key, value) for key, value in (items or {}).items()):
        raise Refused("it holds the state of an optimizer and no weights; name the file with the model's state dict")
    kind = {list: "a list", tuple: "a tuple", Stored: "one tensor without a name", Odd: "one tensor without a name"}
    name = "an empty dictionary" if items == {} else kind.get(type(content), "a dictionary without tensors by name")
    if items is None and type(content) not in kind:
        name = "a class or a function" if isinstance(content, type) else "something else"
    raise Refused(
        f"it holds {name}; it must hold a state dict, that is tensors by name, alone or under one of "
        f"{', '.join(repr(key) for key in EMA[:2] + PLAIN[:3])}; {SAVE}"
    )


def _require_data(value: Any, key: Any, others: list[str]) -> None:
    """Refuse a module that was pickled whole."""
    if isinstance(value, Foreign) and value.name.endswith(PERSISTENT):
        raise Refused(
            "it holds a network with its source code, as NVlabs/edm saves its training; name a network-snapshot-*.pkl"
        )
    if isinstance(value, Foreign) and isinstance(value.state, dict) and "_modules" in value.state:
        where = f" under {ascii(key)[:80]}" if key else ""
        instead = f"; or take other weights with --weights_key {others[0]}" if others else ""
        raise Refused(f"it holds a pickled module ({_class(value)}){where}; loading would run code; {SAVE}{instead}")


def _class(value: Foreign) -> str:
    return ascii(value.name)[1:-1][:100]


def _is_optimizer(key: Any, value: Any) -> bool:
    return (isinstance(key, str) and "optim" in key) or "param_groups" in (_mapping(value) or ())
