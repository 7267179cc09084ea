"""Write a checkpoint as Hugging Face folders that transformers and SGLang load.

python benchmarks/models/export.py --corpus .data/corpus --models DIR --out sts_sglang/models
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from model import DRAFT, TARGET, Config
from safetensors.torch import load_file, save_file
from students import AUX_LAYERS

CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin|>",
    "eos_token": "<|end|>",
    "pad_token": "<|pad|>",
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def config(c: Config) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **c.__dict__,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        **IDS,
    }


def eagle_config(target: dict, vocab: int, aux: tuple[int, ...]) -> dict:
    """Of a one-layer head that drafts `vocab` tokens and reads what `target` has after layers `aux`."""
    return target | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "draft_vocab_size": vocab,
        "target_hidden_size": target["hidden_size"],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(aux)},
    }


def write(folder: Path, checkpoint: Path, settings: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(load_file(checkpoint), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    write_json(folder / "config.json", settings)
    write_json(folder / "generation_config.json", {**IDS, "do_sample": False})


def write_tokenizer(folder: Path, tokenizer: Path) -> None:
    """Of a model that speaks by itself; a head takes its target's."""
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", TOKENIZER)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    settings = {
        "target": config(TARGET),
        "draft": config(DRAFT),
        "eagle3": eagle_config(config(TARGET), TARGET.vocab_size, AUX_LAYERS),
    }
    for name, content in settings.items():
        checkpoint = args.models / f"{'eagle' if name == 'eagle3' else name}.safetensors"
        write(args.out / name, checkpoint, content)
        if name != "eagle3":
            write_tokenizer(args.out / name, args.corpus / "tokenizer.json")
    size = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
