"""Train the small Mixture-of-Experts model that Soloist ships, `models/novels-moe-11m`, from novels to checkpoint.

    python examples/train_novels.py --corpus CORPUS --out models/novels-moe-11m --minutes 7 --compile   # one H100
    python examples/train_novels.py --corpus CORPUS --out models/novels-moe-11m --evaluate              # any machine
    python examples/train_novels.py --corpus CORPUS --out /tmp/try --minutes 1 --books 2 --batch 1  # try it

CORPUS holds `train.txt.xz` and `valid.txt.xz`: UTF-8 text in which a line `<|endoftext|>` ends each book. The model is
transformers' own Qwen3-MoE class, so the checkpoint looks like a released one. Needs torch, transformers, tokenizers.

Shapes: B sequences, L tokens of a sequence, N tokens of a stream, T = B·L, E experts, K experts a token, V vocabulary.
"""

import argparse
import json
import lzma
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, Qwen3MoeExperts, Qwen3MoeRMSNorm

END = "<|endoftext|>"  # id 0, stands before each book
VOCABULARY = 4096
CONTEXT = 2048  # tokens: the longest sequence the model is said to handle, and the window of the evaluation
PROMPTS = ("It was a dark and stormy night, and", '"My dear Watson," said Holmes,', "CHAPTER I\n\n")


# ── Data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_books(path: Path, limit: int | None = None) -> list[str]:
    """The books of an xz file, without the line that ends each; only the first `limit` if given."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [book.strip("\n") for book in file.read().split(END) if book.strip()][:limit]


def train_tokenizer(books: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with `VOCABULARY` entries: any text encodes, decoding gives it back, nothing is added to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(books, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )


def load_or_train_tokenizer(out: Path, books: list[str]) -> PreTrainedTokenizerFast:
    """The tokenizer in `out`; if there is none, a new one, which is saved there."""
    if not (out / "tokenizer.json").exists():
        train_tokenizer(books).save_pretrained(out)
    return AutoTokenizer.from_pretrained(out)


def encode(tokenizer: PreTrainedTokenizerFast, books: list[str]) -> Tensor:
    """One stream `tokens_N` (int64): END and the book, for each book. A few books at a time, to bound the memory."""
    backend, end, stream = tokenizer.backend_tokenizer, tokenizer.eos_token_id, []
    for first in range(0, len(books), 32):
        for encoding in backend.encode_batch_fast(books[first : first + 32], add_special_tokens=False):
            stream.append(torch.tensor([end, *encoding.ids]))
    return torch.cat(stream)


def batches(tokens_N: Tensor, batch: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless `(inputs_BL, targets_BL)`: every pass cuts the stream at other places and shuffles the pieces."""
    offsets_L = torch.arange(length, device=tokens_N.device)
    while True:
        first = int(torch.randint(length, ()))
        starts = torch.arange(first, len(tokens_N) - length, length)
        for starts_B in starts[torch.randperm(len(starts))].to(tokens_N.device).split(batch):
            if len(starts_B) == batch:
                index_BL = starts_B[:, None] + offsets_L
                yield tokens_N[index_BL], tokens_N[index_BL + 1]


# ── Model ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def build_model(layers: int, balance: float, device: str) -> Qwen3MoeForCausalLM:
    """A fresh bf16 model of 1.77 M parameters a layer and 1.05 M in the embedding, which is the output head too."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        intermediate_size=512,  # of dense layers, of which there are none
        norm_topk_prob=True,
        router_aux_loss_coef=balance,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0,
        eos_token_id=0,
        use_cache=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation="grouped_mm")
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return model.to(device)


def compile_parts(model: Qwen3MoeForCausalLM) -> None:
    """Compile attention, experts and norms, each once for all layers. Routers stay eager: their logits are recorded."""
    for module in model.modules():
        if isinstance(module, Qwen3MoeAttention | Qwen3MoeExperts | Qwen3MoeRMSNorm):
            module.compile()


def balance_loss(router_logits: Iterable[Tensor], top_k: int) -> Tensor:
    """Sum over layers of E · Σₑ (share of choices)ₑ · (mean probability)ₑ: 1 a layer when even, up to E when collapsed.

    Taken layer by layer: averaged over layers first, the unevenness of two layers could hide each other.
    """
    losses = []
    for logits_TE in router_logits:
        probabilities_TE = logits_TE.float().softmax(-1)
        losses.append(logits_TE.shape[-1] * chosen_share(logits_TE, top_k) @ probabilities_TE.mean(0))
    return torch.stack(losses).sum()


def chosen_share(logits_TE: Tensor, top_k: int) -> Tensor:
    """`share_E`: the fraction of the T·K (token, choice) pairs that went to each expert."""
    chosen_TK = logits_TE.topk(top_k, -1).indices
    return functional.one_hot(chosen_TK, logits_TE.shape[-1]).float().mean((0, 1))


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class MasterAdamW:
    """AdamW on fp32 copies of a model's bf16 parameters: small updates add up there instead of being rounded away."""

    def __init__(self, parameters: Iterable[Tensor], lr: float):
        self.parameters = list(parameters)
        self.masters = [p.detach().float() for p in self.parameters]
        self.peak_lr = lr
        matrices = [m for m in self.masters if m.dim() > 1]
        scales = [m for m in self.masters if m.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def step(self, lr_factor: float) -> None:
        """One update at `lr_factor` of the peak rate, gradients clipped to norm 1. Consumes the model's gradients."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = self.peak_lr * lr_factor
        self.adamw.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)


def lr_factor(progress: float, warmup: float = 0.02) -> float:
    """Of the peak learning rate, at `progress` in [0, 1] of the training time: up linearly, then down to nothing."""
    return min(progress / warmup, (1 - progress) / (1 - warmup))


def training_step(model: Qwen3MoeForCausalLM, inputs_BL: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the gradients of one batch to the model; returns `(cross entropy in nats a token, balance loss)`."""
    output = model(inputs_BL, use_cache=False, output_router_logits=True)
    loss = functional.cross_entropy(output.logits.float().flatten(0, 1), targets_BL.flatten())
    balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
    (loss + model.config.router_aux_loss_coef * balance).backward()
    return loss.detach(), balance.detach()


def train(model: Qwen3MoeForCausalLM, tokens_N: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Train for `args.minutes` of wall clock, which also drive the learning rate. Saves to `args.out` now and then."""
    optimizer = MasterAdamW(model.parameters(), args.lr)
    data = batches(tokens_N, args.batch, args.length)
    training_step(model, *next(data))  # compiles and warms up before the clock starts
    started, step, progress = time.perf_counter(), 0, 0.0
    while progress < 1:
        loss, balance = training_step(model, *next(data))
        optimizer.step(lr_factor(progress))
        step += 1
        if step % 10 == 0:  # the GPU is at most ten steps behind the clock
            loss.item()
        if step % 100 == 0:
            report(step, time.perf_counter() - started, loss, balance, args)
        if step % 1000 == 0:
            save(model, args.out)
        progress = (time.perf_counter() - started) / (60 * args.minutes)
    seen = step * args.batch * args.length
    return {"steps": step, "tokens": seen, "passes": seen / len(tokens_N), "last_loss": loss.item()}


def report(step: int, elapsed_s: float, loss: Tensor, balance: Tensor, args: argparse.Namespace) -> None:
    """Print one line on how the training goes."""
    rate = f"{step * args.batch * args.length / elapsed_s:,.0f} tokens/s"
    print(f"step {step:6d} {elapsed_s:6.1f} s  loss {loss:.3f}  balance {balance:.3f}  {rate}", flush=True)


def save(model: Qwen3MoeForCausalLM, out: Path) -> None:
    """Write weights and configs, config.json with the keys of released Qwen3-MoE checkpoints, which readers know."""
    model.save_pretrained(out)
    path = out / "config.json"
    config = json.loads(path.read_text())
    config["num_experts"] = config.pop("num_local_experts")
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# ── What came out ────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, tokens_N: Tensor, text_bytes: int) -> dict:
    """Loss on held-out tokens, in windows of `CONTEXT` side by side, and how evenly they were spread over the experts.

    Returns nats a token, bits per byte of text, and per layer the loads of the experts (1.0 = a fair share).
    """
    nats, top_k, share_LE = 0.0, model.config.num_experts_per_tok, 0.0
    for first in range(0, len(tokens_N) - 1, CONTEXT):
        window = tokens_N[first : first + CONTEXT + 1].to(model.device)
        output = model(window[None, :-1], use_cache=False, output_router_logits=True)
        nats += functional.cross_entropy(output.logits[0].float(), window[1:], reduction="sum").item()
        shares = torch.stack([chosen_share(logits_TE, top_k) for logits_TE in output.router_logits])
        share_LE = share_LE + shares * (len(window) - 1)
    loads_LE = share_LE / (len(tokens_N) - 1) * model.config.num_experts
    return {
        "tokens": len(tokens_N) - 1,
        "nats_per_token": round(nats / (len(tokens_N) - 1), 4),
        "bits_per_byte": round(nats / math.log(2) / text_bytes, 4),
        "expert_loads": [[round(load, 2) for load in layer] for layer in loads_LE.tolist()],
    }


@torch.no_grad()
def sample(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, new_tokens: int = 160) -> str:
    """`prompt`, taken as the beginning of a book, and what the model writes after it."""
    prompt_1L = tokenizer(END + prompt, return_tensors="pt").input_ids.to(model.device)
    text_1L = model.generate(prompt_1L, max_new_tokens=new_tokens, do_sample=True, temperature=0.8, top_p=0.95)
    return tokenizer.decode(text_1L[0, 1:])


def show(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, books: list[str]) -> None:
    """Print samples, the expert loads of each layer, and last the whole evaluation as one line of JSON."""
    for prompt in PROMPTS:
        print(f"\n{sample(model, tokenizer, prompt)}\n")
    result = evaluate(model, encode(tokenizer, books), sum(len(book.encode()) for book in books))
    for layer, loads in enumerate(result["expert_loads"]):
        print(f"layer {layer}: expert loads from {min(loads):.2f} to {max(loads):.2f} of a fair share")
    print(json.dumps(result))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of train.txt.xz and valid.txt.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; a tokenizer there is used")
    parser.add_argument("--evaluate", action="store_true", help="do not train: evaluate the model in --out")
    parser.add_argument("--minutes", type=float, default=7.0, help="training time by the clock")
    parser.add_argument("--batch", type=int, default=32, help="sequences a step")
    parser.add_argument("--length", type=int, default=CONTEXT, help="tokens a sequence")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the routers' balance loss")
    parser.add_argument("--compile", action="store_true", help="compile the heavy parts (CUDA)")
    parser.add_argument("--books", type=int, help="read only the first books, to try things out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Tokenizer, tokens, model, training, checkpoint; then read the checkpoint back and evaluate that."""
    args = parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.evaluate:
        books = read_books(args.corpus / "train.txt.xz", args.books)
        tokenizer = load_or_train_tokenizer(args.out, books)
        tokens_N = encode(tokenizer, books).to(args.device)
        print(f"{len(books)} books, {len(tokens_N):,} tokens", flush=True)
        model = build_model(args.layers, args.balance, args.device)
        if args.compile:
            compile_parts(model)
        print(json.dumps(train(model, tokens_N, args)), flush=True)
        save(model, args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).to(args.device)
    show(model, AutoTokenizer.from_pretrained(args.out), read_books(args.corpus / "valid.txt.xz", args.books))


if __name__ == "__main__":
    main()
