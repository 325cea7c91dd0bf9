"""What kvpress keeps of a dense model's cache, in transformers: its presses on documents, at shares of the prompt.

    python -m experiments.neighbours presses ADAPTER --base SmolLM2.gguf --data corpora/papers --split validation --json FILE

A press compresses the keys and values of a prompt once, when it has been read densely; responses are decoded greedily on what is left,
at the prompt's own positions. Prompts are read once for all presses, each by itself; then all that kept the same share are decoded in one
batch, the shorter ones masked. `knorm, decoding` compresses while it decodes too, as kvpress' page shows it: a DecodingPress of KnormPress.

kvpress 0.5.5 names versions of transformers below 5.3. Later ones call the cache otherwise, so its presses are called here, not its hooks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional

from data import commandline, examples
from data.errors import check_range
from data.tasks import TASKS
from selfspan_jax import files
from selfspan_jax.errors import UserError
from selfspan_jax.evaluation import MARGIN_TOKENS
from selfspan_jax.lm import SpanLM
from selfspan_jax.weights import huggingface

NAMES = ("snapkv", "streaming", "expected", "knorm", "tova", "chunks")
"""Presses of kvpress: SnapKV, StreamingLLM, expected attention, key norms, TOVA; and ChunkKV, which keeps whole pieces of 20 tokens by
SnapKV's scores, as Quest reads whole pages."""
MAX_SMALL = 20  # percent of a prompt that are decoded in one batch; what keeps more, and what keeps all, are in a second one
DECODING = "knorm, decoding"
INTERVAL_TOKENS = 16  # between two compressions while it decodes


def press_of(name: str, share: float) -> Any:
    """Make a press that keeps this share of a prompt."""
    import kvpress

    if name == "chunks":
        return kvpress.ChunkKVPress(press_of("snapkv", share))
    classes = {"snapkv": "SnapKV", "streaming": "StreamingLLM", "expected": "ExpectedAttention", "knorm": "Knorm", "tova": "TOVA"}
    return getattr(kvpress, f"{classes[name]}Press")(compression_ratio=1 - share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelAndCorpus:
    """What comparisons on documents have: a model, and the examples of a corpus that it answers."""

    model: Positional[Path]
    """As `decode.py` takes it."""
    data: Path
    """A corpus directory."""
    base: Path | None = None
    """For an adapter: the model that it was trained on."""
    split: str = "validation"
    """Of the corpus."""
    num_examples: int = 24
    """The first ones of at most `max-prompt-tokens`."""
    max_prompt_tokens: int = 8192
    """Longer prompts are left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Presses(ModelAndCorpus):
    """Decode documents in transformers on what kvpress keeps of a dense model's cache, and score the responses."""

    batch_size: int = 24
    """Prompts whose responses are decoded together, under all presses at once."""
    shares: Annotated[tuple[float, ...], commandline.commas(float)] = (5, 10, 20, 50)
    """Of each prompt, in percent."""
    presses: Annotated[tuple[str, ...], commandline.commas(*NAMES)] = NAMES
    """Of kvpress."""
    max_new_tokens: int | None = None
    """Stop after so many tokens; by default somewhat more than the longest gold response."""
    decoding_shares: Annotated[tuple[float, ...], commandline.commas(float)] = ()
    """Shares of the mean prompt that are kept while it decodes, too; in percent."""
    timed_tokens: int = 0
    """Time so many decode steps of one batch under each press, and dense, each alone, in place of scoring; 0 for none."""
    json: Path | None = None
    """Write the rows into this file, each as soon as it is there."""

    def __post_init__(self):
        check_range(self, "num_examples", "batch_size", low=1)
        check_range(self, "shares", "decoding_shares", low=0.1, high=100)
        check_range(self, "timed_tokens", low=0)

    def run(self) -> None:
        if importlib.util.find_spec("kvpress") is None:
            raise UserError("kvpress is not installed; pip install --no-deps kvpress cachetools fire")
        import torch
        import transformers

        lm = SpanLM.load(self.model, TASKS, base=self.base)
        lm.task, some = chosen(lm, self)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with tempfile.TemporaryDirectory() as directory:
            huggingface.export(Path(directory) / "model", lm.model)
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            loaded = transformers.AutoModelForCausalLM.from_pretrained(Path(directory) / "model", dtype=dtype)
        peer = Peer(loaded.to(device).eval(), lm.end_ids)
        name = torch.cuda.get_device_name() if device == "cuda" else device
        report: dict[str, Any] = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
        report |= {"model": files.model_name(self.model), "data": self.data.name, "num_examples": len(some), "presses": []}
        ids = [lm.task.encode_prompt(example.prompt) for example in some]
        limit = self.max_new_tokens or max(len(example.response_ids) for example in some) + MARGIN_TOKENS
        settings = [(name, share) for share in self.shares for name in self.presses]
        if self.timed_tokens:
            report["presses"] = list(peer.timed(ids[: self.batch_size], settings, self.decoding_shares, self.timed_tokens))
            return files.write_rows(self.json, report, complete=True)
        found: dict[tuple[str, float], list[Any]] = {}
        started = time.perf_counter()
        for start in range(0, len(ids), self.batch_size):
            prompts = ids[start : start + self.batch_size]
            made = {(name, share): press_of(name, share / 100) for name, share in settings}
            kept, first = peer.read(prompts, made)
            print(f"{len(prompts)} prompts read after {time.perf_counter() - started:.0f} s", flush=True)
            for group in ([key for key in settings if key[1] <= MAX_SMALL], [key for key in kept if key[1] > MAX_SMALL]):
                own_caches = {key: kept.pop(key) for key in group}
                for key, own in peer.decode_all(own_caches, first, prompts, limit).items() if group else ():
                    found.setdefault(key, []).extend(own)
                report["presses"] = [row_of(key, own, lm.task, some, ids) for key, own in found.items()]
                files.write_rows(self.json, report, complete=False)
                print(*report["presses"], f"{time.perf_counter() - started:.0f} s", sep="\n", flush=True)
        for share in self.decoding_shares:
            responses = peer.decode_compressing(*peer.read_to(ids, share), ids, limit)
            report["presses"].append(row_of((DECODING, share), responses, lm.task, some, ids))
            files.write_rows(self.json, report, complete=False)
        files.write_rows(self.json, report | {"seconds": time.perf_counter() - started}, complete=True)


def row_of(key: tuple[str, float], responses: Sequence[Any], task: Any, some: Sequence[Any], ids: Sequence[Any]) -> dict[str, Any]:
    """Score the responses to the first examples under a press."""
    number = len(responses)
    reads = [rows / (len(own) + np.arange(1, len(rows) + 1)) for own, (_, rows) in zip(ids, responses)]
    rows = float(np.concatenate([rows for _, rows in responses]).mean())
    read = {"num_examples": number, "attended_fraction": float(np.concatenate(reads).mean()), "attended_tokens": rows}
    return {"neighbour": key[0], "share": key[1], **read, **task.scores(some[:number], [tokens for tokens, _ in responses])}


def num_bytes(caches: Sequence[Any]) -> int:
    """Return the bytes of caches of several prompts."""
    return sum(x.numel() * x.element_size() for own in caches for layer in own for x in layer)


def chosen(lm: SpanLM, settings: ModelAndCorpus) -> tuple[Any, list[Any]]:
    """Return the task that scores the corpus, and its first examples whose prompts are short enough."""
    task, sets, _ = examples.stored(settings.data, lm.task, TASKS, 4 * settings.num_examples, settings.split)
    ((_, every),) = sets.items()
    short = [own for own in every if len(task.encode_prompt(own.prompt)) <= settings.max_prompt_tokens]
    if not short:
        raise UserError(f"{settings.data}: no prompt of the first {len(every)} has at most {settings.max_prompt_tokens} tokens")
    return task, short[: settings.num_examples]


class Peer:
    """A model of transformers, its prompts compressed by presses."""

    def __init__(self, model: Any, end_ids: Sequence[int]):
        import torch

        self.torch, self.model, self.end_ids = torch, model, end_ids
        self.device = next(model.parameters()).device

    def read(self, prompts: Sequence[Any], presses: Mapping[Any, Any]) -> tuple[dict[Any, list[Any]], list[int]]:
        """Read prompts densely. Return what each press keeps of each prompt, [(keys, values)] of its layers, under ("dense", 100) all; and
        the likeliest first tokens."""
        kept: dict[Any, list[Any]] = {key: [] for key in (*presses, ("dense", 100.0))}
        first = []
        for prompt in prompts:
            layers: dict[Any, list[Any]] = {key: [] for key in kept}

            def compress(module, hidden, cache, output, named, layers=layers):
                own = cache.layers[module.layer_idx]
                layers["dense", 100.0].append((own.keys, own.values))
                for key, press in presses.items():
                    layers[key].append(press.compress(module, hidden, own.keys, own.values, None, named))

            ids = self.torch.tensor(np.asarray(prompt)[None], device=self.device, dtype=self.torch.long)
            with self.torch.no_grad(), self.hooked(compress, presses.values()):
                first.append(int(self.model(ids, logits_to_keep=1, use_cache=True).logits[0, -1].argmax()))
            for key, own in layers.items():  # ChunkKV may keep a short prompt's last piece, which is not whole, in some layers alone
                size = min(k.shape[2] for k, _ in own)
                kept[key].append([(k[:, :, -size:], v[:, :, -size:]) for k, v in own])
        return kept, first

    @contextlib.contextmanager
    def hooked(self, after: Callable[..., None], presses: Any = ()) -> Iterator[None]:
        """Call `after(module, hidden states, cache, output, keywords)` whenever a layer has attended; keywords are kvpress' names."""
        for press in presses:
            press.post_init_from_model(self.model)

        def hook(module, given, keywords, output):
            cache = keywords.get("past_key_values", keywords.get("cache"))
            hidden = keywords["hidden_states"] if "hidden_states" in keywords else given[0]
            seen = self.torch.arange(cache.layers[module.layer_idx].keys.shape[2], device=self.device)
            named = {**keywords, "past_key_values": cache, "cache_position": seen, "hidden_states": hidden}
            after(module, hidden, cache, output, named)

        hooks = []
        for layer in self.model.model.layers:
            layer.self_attn.rotary_emb = self.model.model.rotary_emb  # where presses look for it
            hooks.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for own in hooks:
                own.remove()

    def decode_all(self, kept: Mapping[Any, list[Any]], first: Sequence[int], prompts: Sequence[Any], limit: int) -> dict[Any, list[Any]]:
        """Decode every prompt under every press in one batch; return the response tokens, and the rows that each of them read."""
        caches = [own for several in kept.values() for own in several]
        times = len(kept)
        found = self.decode(caches, [*first] * times, [len(prompt) for prompt in prompts] * times, limit)
        return {key: found[number * len(prompts) : (number + 1) * len(prompts)] for number, key in enumerate(kept)}

    def cache_of(self, caches: Sequence[Any]) -> tuple[Any, Any]:
        """Put caches of several sequences into one, padded at their beginnings; return it and its mask."""
        from transformers import DynamicCache

        torch, sizes = self.torch, [own[0][0].shape[2] for own in caches]
        longest, cache = max(sizes), DynamicCache()
        for index in range(len(caches[0])):
            padded = [
                [torch.nn.functional.pad(own[index][i], (0, 0, longest - size, 0)) for own, size in zip(caches, sizes)] for i in (0, 1)
            ]
            cache.update(torch.cat(padded[0]), torch.cat(padded[1]), index)
        place = torch.arange(longest, device=self.device)[None]
        return cache, (place >= longest - torch.tensor(sizes, device=self.device)[:, None]).long()

    def decode(self, caches: Sequence[Any], first: Sequence[int], lengths: Sequence[int], limit: int, *, stops: bool = True) -> list[Any]:
        """Decode greedily from caches, at the prompts' positions, until all have ended, unless told otherwise."""
        torch, sizes = self.torch, [own[0][0].shape[2] for own in caches]
        cache, mask = self.cache_of(caches)
        tokens = [torch.tensor(first, device=self.device)]
        positions, ends = torch.tensor(lengths, device=self.device), torch.tensor(list(self.end_ids), device=self.device)
        done = torch.isin(tokens[0], ends)
        one = torch.ones((len(sizes), 1), dtype=mask.dtype, device=self.device)
        for step in range(limit - 1):
            if stops and step % 8 == 0 and bool(done.all()):
                break
            mask = torch.cat([mask, one], dim=1)
            tokens.append(self.step(tokens[-1], cache, positions + step, mask))
            done |= torch.isin(tokens[-1], ends)
        return self.responses(torch.stack(tokens, dim=1), lambda number: np.arange(1, limit + 1) + sizes[number])

    def step(self, tokens: Any, cache: Any, positions: Any, mask: Any) -> Any:
        """Feed a token of each sequence; return the likeliest next ones."""
        name = "past_key_values" if "past_key_values" in inspect.signature(self.model.forward).parameters else "cache"
        with self.torch.no_grad():
            options = {"position_ids": positions[:, None], "attention_mask": mask, name: cache, "use_cache": True}
            return self.model(tokens[:, None], **options).logits[:, -1].argmax(dim=1)

    def timed(
        self, prompts: Sequence[Any], settings: Sequence[tuple[str, float]], decoding_shares: Sequence[float], num_tokens: int
    ) -> Iterator[dict[str, Any]]:
        """Time decode steps of a batch on what each press keeps, three times, the median; and the most memory that they took, in bytes,
        without what other presses keep."""
        kept, first = self.read(prompts, {(name, share): press_of(name, share / 100) for name, share in settings})
        kept |= {(DECODING, share): self.read_to(prompts, share)[0] for share in decoding_shares}
        lengths, cuda = [len(prompt) for prompt in prompts], self.torch.cuda if self.device.type == "cuda" else None
        for key in [*kept]:
            caches, seconds = kept.pop(key), []
            for _ in range(4):
                if cuda:
                    cuda.synchronize()
                    cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                if key[0] == DECODING:
                    found = self.decode_compressing(caches, first, prompts, num_tokens + 1, stops=False)
                else:
                    found = self.decode(caches, first, lengths, num_tokens + 1, stops=False)
                seconds.append(time.perf_counter() - began)
            step, read = float(np.median(seconds[1:])) / num_tokens, float(np.mean([rows.mean() for _, rows in found]))
            row = {"neighbour": key[0], "share": key[1], "attended_tokens": read, "batch_size": len(prompts)}
            row |= {"ms_per_step": 1e3 * step, "tokens_per_second": len(prompts) / step}
            row["peak_bytes"] = cuda.max_memory_allocated() - sum(map(num_bytes, kept.values())) if cuda else None
            row["cache_bytes"] = num_bytes(caches)
            print(row, flush=True)
            yield row

    def responses(self, tokens: Any, rows: Callable[[int], np.ndarray]) -> list[Any]:
        """Cut responses behind their ends; beside them stand the rows that each token read, itself included."""
        found = []
        for number, own in enumerate(tokens.cpu().numpy()):
            ends = np.flatnonzero(np.isin(own, self.end_ids))
            size = int(ends[0]) + 1 if len(ends) else len(own)
            found.append((own[:size], rows(number)[:size]))
        return found

    def read_to(self, prompts: Sequence[Any], share: float) -> tuple[list[Any], list[int]]:
        """Read prompts densely, each by itself; keep as many rows of each, a share of the mean prompt, by the norms of keys."""
        import kvpress

        knorm, kept, first = kvpress.KnormPress(), list[Any](), list[int]()
        size = max(1, min(round(share / 100 * float(np.mean([*map(len, prompts)]))), *(len(prompt) - 1 for prompt in prompts)))
        for prompt in prompts:
            knorm.compression_ratio = 1 - (size + 0.5) / len(prompt)
            own, token = self.read([prompt], {"own": knorm})
            kept, first = [*kept, *own["own"]], [*first, *token]
        return kept, first

    def decode_compressing(
        self, kept: Sequence[Any], first: Sequence[int], prompts: Sequence[Any], limit: int, interval: int = INTERVAL_TOKENS, *, stops=True
    ) -> list[Any]:
        """Decode greedily from caches of one size, which are compressed to as many rows again after every `interval` tokens."""
        import kvpress

        torch = self.torch
        press = kvpress.DecodingPress(kvpress.KnormPress(), compression_interval=interval, target_size=kept[0][0][0].shape[2])
        cache, _ = self.cache_of(kept)
        tokens, positions = [torch.tensor(first, device=self.device)], torch.tensor([*map(len, prompts)], device=self.device)
        rows, done = [], torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        with self.hooked(lambda module, hidden, cache, output, named: press.forward_hook(module, [], named, output)):
            for step in range(limit - 1):
                rows.append(cache.layers[0].keys.shape[2] + 1)
                tokens.append(self.step(tokens[-1], cache, positions + step, None))
                done |= torch.isin(tokens[-1], torch.tensor(list(self.end_ids), device=self.device))
                if stops and step % 8 == 0 and bool(done.all()):
                    break
        return self.responses(torch.stack(tokens, dim=1), lambda _: np.array([*rows, rows[-1] + 1]))
