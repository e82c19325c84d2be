"""A depthmix model as a language model of lm-eval (0.4), and what its tasks say of it.

A request that does not fit the model's context is refused before anything is computed; with ``truncate`` the
beginning of its context is left out, and how often is part of the result.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..data.tokenizers import Tokenizer
from ..errors import RunError, UserError, suggest
from ..generation import Sampling, generate
from ..model import GPT
from .perplexity import perplexity
from .score import score

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise UserError('--tasks needs a package that is not installed: pip install "depthmix[eval]"') from error

TASKS = Path(__file__).parent / "tasks"
DEFAULT_NEW_TOKENS = 256
"""As in lm-eval, for a task that does not say ``max_gen_toks``."""


@dataclass(frozen=True)
class _Continuation:
    """What is asked of a prompt; prompts of which the same is asked share batches."""

    tokens: int
    until: tuple[str, ...]
    sampling: Sampling


class DepthmixLM(TemplateLM):
    """``model`` and ``tokenizer`` for :func:`lm_eval.simple_evaluate`.

    ``told`` is given how many requests of one kind are done, and how many there are.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 16,
        truncate: bool = False,
        told: Callable[[int, int], None] | None = None,
    ):
        super().__init__()
        self.model, self.words, self.batch_size, self.truncate = model, tokenizer, batch_size, truncate
        self.told = told or (lambda done, total: None)
        self.context = model.config.seq_len
        self.truncated = 0
        """Requests whose context was cut."""
        self._device = model.embed.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.words.end_token

    @property
    def tokenizer_name(self) -> str:
        return self.words.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.words.encode(string)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """``(log p(continuation | context), is it the greedy one)``; an empty context is the end token."""
        pairs = []
        for context, continuation in (request.args for request in requests):
            if context == "":
                pairs.append(([self.eot_token_id], self.tok_encode(continuation)))
            else:
                pairs.append(self._encode_pair(context, continuation))
        return self._scored([pair if pair[0] else ([self.eot_token_id], pair[1]) for pair in pairs])

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        return self._scored([(context, continuation) for _, context, continuation in requests])

    def _scored(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        fitting, long = [], 0
        for before, after in pairs:
            room = self.context + 1 - len(after)
            if room < 1:
                raise UserError(
                    f"a continuation of {len(after)} tokens does not fit the model's context of {self.context}; it "
                    f"cannot be scored by this model"
                )
            long += len(before) > room
            fitting.append((before[-room:], after))
        self._cut(long, len(pairs))
        return [
            (float(logs.sum()), greedy)
            for logs, greedy in score(
                self.model,
                fitting,
                batch_size=self.batch_size,
                told=lambda done: self.told(done, len(fitting)),
            )
        ]

    def _cut(self, count: int, total: int) -> None:
        if count and not self.truncate:
            raise UserError(
                f"{count} of {total} requests do not fit the model's context of {self.context} tokens; --truncate "
                f"leaves out their beginnings and counts them, fewer --fewshot examples make them shorter"
            )
        self.truncated += count

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """``log p(text)``, each token once; windows move by a whole context, as lm-eval's own models do."""
        found = []
        for (text,) in (request.args for request in requests):
            nats = 0.0
            if text:
                nats = perplexity(
                    self.model, self.words, [text], stride=self.context, batch_size=self.batch_size
                ).nats
            found.append(-nats)
            self.told(len(found), len(requests))
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of ``until``, greedy unless ``do_sample`` and a temperature say otherwise."""
        groups: dict[_Continuation, list[tuple[int, list[int]]]] = {}
        long = 0
        for place, (prompt, options) in enumerate(request.args for request in requests):
            asked = self._asked(dict(options))
            ids = self.tok_encode(prompt) or [self.eot_token_id]
            room = self.context + 1 - asked.tokens
            long += len(ids) > room
            groups.setdefault(asked, []).append((place, ids[-room:]))
        self._cut(long, len(requests))
        found, done = [""] * len(requests), 0
        for asked, members in groups.items():
            members.sort(key=lambda member: -len(member[1]))
            for first in range(0, len(members), self.batch_size):
                part = members[first : first + self.batch_size]
                texts = self._continue([ids for _, ids in part], asked)
                for (place, _), text in zip(part, texts, strict=True):
                    found[place] = text
                done += len(part)
                self.told(done, len(requests))
        return found

    def _asked(self, options: dict) -> _Continuation:
        until = options.pop("until", None) or ()
        tokens = options.pop("max_gen_toks", options.pop("max_new_tokens", DEFAULT_NEW_TOKENS))
        sample = options.pop("do_sample", None)
        temperature = options.pop("temperature", 1.0 if sample else 0.0) if sample is not False else 0.0
        if tokens > self.context:
            raise UserError(
                f"the task generates up to {tokens} tokens, and the model's context is {self.context}; lower it "
                f"with --max-new-tokens"
            )
        sampling = Sampling(
            temperature, options.pop("top_k", None), options.pop("top_p", None), self.words.vocab_size
        )
        return _Continuation(
            tokens, tuple(filter(None, [until] if isinstance(until, str) else until)), sampling
        )

    def _continue(self, prompts: list[list[int]], asked: _Continuation) -> list[str]:
        rows: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        done = [False] * len(prompts)
        steps = generate(
            self.model, [torch.tensor(ids) for ids in prompts], asked.tokens, seed=0,
            end_token=self.eot_token_id, **asdict(asked.sampling),
        )  # fmt: skip
        for step in steps:
            for row, token in enumerate(step.tolist()):
                if done[row]:
                    continue
                if token == self.eot_token_id:
                    done[row] = True
                    continue
                rows[row].append(token)
                texts[row] = self.words.decode(rows[row])
                done[row] = any(stop in texts[row] for stop in asked.until)
            if all(done):
                break
        for row, text in enumerate(texts):
            cuts = [at for at in (text.find(stop) for stop in asked.until) if at >= 0]
            texts[row] = text[: min(cuts)] if cuts else text
        return texts


def shipped_tasks() -> list[str]:
    """Names of the tasks that come with depthmix."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def _shipped(name: str) -> dict:
    """A shipped task with the place of its examples."""
    import yaml

    task = yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"))
    task["dataset_kwargs"] = {"data_files": {"test": str(TASKS / f"{name}.jsonl")}}
    return task


def run_tasks(
    model: DepthmixLM,
    names: list[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> dict:
    """``results``, ``versions``, ``n-shot``, ``n-samples`` of lm-eval for the named tasks.

    ``include_path``: a folder of task files (``.yaml``), searched before those of lm-eval. Task files are programs:
    ``!function`` in them runs the Python file beside them.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path} is no folder; give one that holds task files (.yaml)")
    ours = shipped_tasks()
    given = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=given, include_defaults=False)
    others = [name for name in names if name not in ours or name in manager.all_tasks]
    if any(name not in manager.all_tasks for name in others):
        manager = TaskManager(include_path=given)
        for name in others:
            if not manager.match_tasks([name]):
                raise UserError(suggest(name, [*ours, *_near(name, manager.all_tasks)], "task"))
    tasks = [name if name in others else _shipped(name) for name in names]
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=copy.deepcopy(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=1000,
            gen_kwargs=None if max_new_tokens is None else {"max_gen_toks": max_new_tokens},
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            log_samples=False,
        )
    except (ConnectionError, TimeoutError) as error:
        raise RunError(
            f"the examples of {', '.join(names)} cannot be fetched ({str(error).splitlines()[0]}); check the network, "
            f"or take a task whose examples lie here: {', '.join(ours)}, or one of --include-path"
        ) from error
    except FileNotFoundError as error:
        raise UserError(
            f"the examples of {', '.join(names)} are not there ({str(error).splitlines()[0]}); paths in a task file "
            f"are relative to {os.getcwd()}"
        ) from error
    return {
        "lm_eval": lm_eval.__version__,
        **{key: found[key] for key in ("results", "versions", "n-shot", "n-samples") if key in found},
        **{key: found[key] for key in ("groups",) if found.get(key)},
        "truncated": model.truncated,
    }


def _near(name: str, known: list[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, known, n=8, cutoff=0.5)
