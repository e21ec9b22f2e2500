"""Writes a checkpoint of random weights in the form of Qwen3-30B-A3B, of any number of layers: 1.2 GB in bf16 each.

To see how fast loading is without a download:

    python examples/write_checkpoint.py /tmp/qwen3-8 --layers 8 --device cuda
    soloist bench reading /tmp/qwen3-8 --device cuda
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from soloist.models.families import locations
from soloist.models.random_weights import RandomWeights
from soloist.specs.hf import read_config
from soloist.specs.parameters import Param, parameters

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
}


def write(folder: Path, layers: int, device: str) -> None:
    """`folder` gets config.json, a safetensors file for each layer and one for what lies outside of them, the index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}, indent=2))
    spec = read_config(folder)
    source = RandomWeights(spec, 0, torch.bfloat16, device)
    params: defaultdict[int, list[tuple[str, Param]]] = defaultdict(list)
    for param, shape in parameters(spec):
        params[param.layer].append((next(locations(spec, param, shape)).tensor, param))
    files: dict[str, str] = {}
    for layer, named in params.items():
        file = "outside.safetensors" if layer < 0 else f"layer-{layer:03}.safetensors"
        save_file({tensor: source.read(param).to(torch.bfloat16).cpu() for tensor, param in named}, folder / file)
        files |= {tensor: file for tensor, _ in named}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="where the weights are drawn: cuda is faster")
    arguments = parser.parse_args()
    write(arguments.folder, arguments.layers, arguments.device)


if __name__ == "__main__":
    main()
