"""Models with masked attention or experts, against Inductor; `python -m benchmarks.whole_models`.

Random weights in honest sizes: what counts is how much of a model attention or its experts are, and
that nothing else gets slower. Each model is left as it is written: Mistral's and ModernBERT's masks
come from Hugging Face's builders, Gemma 2 has its soft-cap in eager code, the small GPT has the
`tril` buffer and the -inf of nanoGPT; experts run in Hugging Face's default, `grouped_mm`. One
token stands for a step of decoding.
"""

import argparse
import dataclasses
import gc
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import harness, targets
from benchmarks.attention_peers import listening, told
from benchmarks.contestants import OURS, Unavailable, require_backend

_VOCABULARY = 4096
_BACKENDS = ("inductor", OURS)
# fp32 sums in another order through six layers.
_TOLERANCE = 1e-3
# Gradients are compared with Inductor's, relative to the model's largest.
_GRADIENT_TOLERANCE = 5e-3

_SIZES = {
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 16384,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclasses.dataclass(frozen=True)
class Model:
    """How a model is made and how long its inputs are.

    Attributes:
        make: an untrained model in float32.
        tokens: lengths of a forward; the first is that of the default run.
        training_tokens: length of a training step.
        keywords: further arguments of the forward, beside the tokens.
        output: name of the tensor that is looked at.
    """

    make: Callable[[], torch.nn.Module]
    tokens: tuple[int, ...]
    training_tokens: int
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)
    output: str = "logits"


class _Attention(torch.nn.Module):
    """Causal attention as hand-written GPTs have it: scores, `tril`, -inf, softmax, dropout."""

    def __init__(self, width: int, heads: int, longest: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = torch.nn.Linear(width, 3 * width)
        self.c_proj = torch.nn.Linear(width, width)
        self.dropout = torch.nn.Dropout(0.0)
        self.register_buffer("bias", torch.ones(longest, longest).tril()[None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(width, 2))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        y = self.dropout(F.softmax(scores, dim=-1)) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(x.shape))


class _Block(torch.nn.Module):
    def __init__(self, width: int, heads: int, longest: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = _Attention(width, heads, longest)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class SmallGPT(torch.nn.Module):
    """A GPT in the style of nanoGPT; returns {"logits"}."""

    def __init__(self, width: int, layers: int, heads: int, longest: int) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(_VOCABULARY, width)
        self.wpe = torch.nn.Embedding(longest, width)
        self.h = torch.nn.ModuleList(_Block(width, heads, longest) for _ in range(layers))
        self.ln_f = torch.nn.LayerNorm(width)
        self.lm_head = torch.nn.Linear(width, _VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1]))
        for block in self.h:
            x = block(x)
        return {"logits": self.lm_head(self.ln_f(x))}


def _hugging_face(
    model: str, config: str, implementation: str, **settings: Any
) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        import transformers

        made = getattr(transformers, config)(**_SIZES, **settings)
        made._attn_implementation = implementation
        return getattr(transformers, model)(made)

    return make


_DECODER = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1408}
_NO_CACHE = {"use_cache": False}

MODELS = {
    "mistral, window 512, 6 layers of 512": Model(
        _hugging_face(
            "MistralForCausalLM",
            "MistralConfig",
            "sdpa",
            **_DECODER,
            num_hidden_layers=6,
            num_key_value_heads=2,
            sliding_window=512,
        ),
        (4096, 2048),
        2048,
        _NO_CACHE,
    ),
    "gemma 2, window 512 / full, 4 layers of 512": Model(
        _hugging_face(
            "Gemma2ForCausalLM",
            "Gemma2Config",
            "eager",
            **_DECODER,
            num_hidden_layers=4,
            num_key_value_heads=4,
            head_dim=64,
            query_pre_attn_scalar=64,
            sliding_window=512,
        ),
        (2048, 4096),
        2048,
        _NO_CACHE,
    ),
    "modernbert, local 128 / full, 6 layers of 768": Model(
        _hugging_face(
            "ModernBertModel",
            "ModernBertConfig",
            "sdpa",
            hidden_size=768,
            num_attention_heads=12,
            intermediate_size=1152,
            num_hidden_layers=6,
            cls_token_id=1,
            sep_token_id=2,
        ),
        (2048, 4096),
        2048,
        {},
        "last_hidden_state",
    ),
    "mixtral, 8 x 1792 top 2, 4 layers of 512": Model(
        _hugging_face(
            "MixtralForCausalLM",
            "MixtralConfig",
            "sdpa",
            **{**_DECODER, "intermediate_size": 1792},
            num_hidden_layers=4,
            num_key_value_heads=2,
            num_local_experts=8,
        ),
        (1, 512),
        128,
        _NO_CACHE,
    ),
    "qwen 3, 64 x 256 top 8, 4 layers of 512": Model(
        _hugging_face(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            "sdpa",
            **_DECODER,
            moe_intermediate_size=256,
            num_hidden_layers=4,
            num_key_value_heads=2,
            num_experts=64,
            num_experts_per_tok=8,
            norm_topk_prob=True,
        ),
        (1, 512),
        128,
        _NO_CACHE,
    ),
    "small gpt, causal, 6 layers of 768": Model(
        lambda: SmallGPT(768, 6, 12, 4096), (1024, 2048, 4096), 1024
    ),
}


def _phases(name: str, full: bool) -> list[tuple[str, int]]:
    """What is measured of a model, at which lengths: by default, training of the first only."""
    spec = MODELS[name]
    lengths = spec.tokens if full else spec.tokens[:1]
    training = full or name == next(iter(MODELS))
    return [("forward", n) for n in lengths] + [("training", spec.training_tokens)] * training


def _built(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[name].make().eval()


def _step(
    name: str, phase: str, model: torch.nn.Module, backend: str, tokens: int
) -> Callable[[], list[torch.Tensor]]:
    """One forward (its output) or one training step (all gradients)."""
    spec = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, _VOCABULARY, (1, tokens), generator=generator)
    forward: Callable[..., Any] = model
    if backend != "eager":
        forward = torch.compile(model, backend=backend, dynamic=False)
    parameters = list(model.parameters())

    def step() -> list[torch.Tensor]:
        with torch.set_grad_enabled(phase == "training"):
            output = forward(input_ids=ids, **spec.keywords)[spec.output]
            if phase == "forward":
                return [output]
            loss = output.square().mean()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            return [gradient for gradient in gradients if gradient is not None]

    return step


def _compare(got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float) -> None:
    size = max(float(y.abs().max()) for y in want)
    error = max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True)) / size
    if not error <= tolerance:
        raise Unavailable(f"WRONG RESULT: differs from eager by {error:.1e} (relative)")


def time_case(
    name: str, phase: str, rounds: int, tokens: int, notes: dict[str, None]
) -> harness.Measurement:
    """Times one phase of one model; `notes` get what was said, and why somebody has no figure."""
    torch._dynamo.reset()
    model = _built(name).train(phase == "training")
    tolerance = _TOLERANCE if phase == "forward" else _GRADIENT_TOLERANCE
    want = _step(name, phase, model, "eager", tokens)()
    contestants: list[harness.Contestant] = []
    for backend in _BACKENDS:
        said: list[Any] = []
        try:
            if backend == OURS:
                require_backend()
            step = _step(name, phase, model, backend, tokens)
            with listening(said):
                _compare(step(), want, tolerance)
            contestants.append(harness.Local(backend, step))
        except Exception as error:  # stays in the table, the others are still timed
            first = str(error).strip().splitlines() or [""]
            notes[f"[no figure] {backend}, {name}: {type(error).__name__}: {first[0]}"] = None
        if backend == OURS:
            notes[f"[{OURS}] {name}, {phase} of {tokens} tokens: {told(said)}"] = None
    del want
    gc.collect()
    return harness.measure(contestants, rounds)


def run(
    rounds: int = harness.ROUNDS, keep: bool = False, full: bool = False, scale: int = 1
) -> None:
    """Measures, prints and records all models."""
    table = harness.Table(
        f"whole models, fp32, batch 1, median of {rounds} interleaved rounds",
        [
            "model",
            "phase",
            "tokens",
            *(f"{b} ms" for b in _BACKENDS),
            "against inductor",
            "target",
            "others",
        ],
        [45, 8, 6, 11, 9, 23, 16, 0],
    )
    records: list[dict[str, object]] = []
    notes: dict[str, None] = {}
    for name in MODELS:
        for phase, length in _phases(name, full):
            tokens = max(1, length // scale)
            measured = time_case(name, phase, rounds, tokens, notes)
            table.add(name, phase, tokens, *_figures(measured))
            records.append({"model": name, "phase": phase, "tokens": tokens, **measured.to_dict()})
    print()
    for note in notes:
        print(note)
    harness.write_results("whole-models", table.machine, records, keep)


def _figures(measured: harness.Measurement) -> list[str]:
    times = [
        f"{measured.seconds(backend) * 1e3:.1f}" if backend in measured.rounds else "none"
        for backend in _BACKENDS
    ]
    ratio = measured.ratio(*_BACKENDS) if set(_BACKENDS) <= set(measured.rounds) else None
    said = harness.verdict(ratio.median if ratio else None, targets.NEVER_SLOWER)
    others = f"{statistics.median(measured.others):.2f}"
    return [*times, str(ratio or "-"), "disturbed" if measured.disturbed else said, others]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    harness.add_arguments(parser)
    parser.add_argument(
        "--full", action="store_true", help="more lengths, and training of all models"
    )
    parser.add_argument("--shrink", type=int, default=1, help="divide lengths: a trial run")
    arguments = parser.parse_args()
    run(arguments.rounds, arguments.keep, arguments.full, arguments.shrink)


if __name__ == "__main__":
    main()
