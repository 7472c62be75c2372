import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer():
    """A byte-level tokenizer with a chat template whose pad token is its end token, as SmolLM2's is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    )


def make_model(seed: int = 0, **config):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = dict(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(LlamaConfig(**(shape | config)))


@pytest.fixture(autouse=True)
def log_level():
    """Commands that run in this process set the level of our log, and `caplog` of later tests would hold more."""
    logger = logging.getLogger("apo_trl")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A tiny Llama and its tokenizer, saved as a folder."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def rows(number: int = 8) -> list[dict]:
    """Pairs of different lengths, in TRL's conversational format."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Add {i} and {i + 1}."}],
            "chosen": [{"role": "assistant", "content": f"It is {2 * i + 1}" + "!" * (i % 4)}],
            "rejected": [{"role": "assistant", "content": f"Perhaps {i}" + "?" * (i % 3) + " or so" * (i % 2)}],
            "chosen_wins": (i % 5) / 4,
        }
        for i in range(number)
    ]


@pytest.fixture
def dataset():
    from datasets import Dataset

    return Dataset.from_list(rows())


@pytest.fixture
def train(model_dir, dataset, tmp_path):
    """Train the tiny model and give the trainer: `train(loss_type="apo_zero", steps=4, ...)`."""

    def run(trainer_class=None, config_class=None, *, model=None, data=dataset, steps=4, run=True, **settings):
        from apo_trl import APOConfig, APOTrainer

        trainer_class, config_class = trainer_class or APOTrainer, config_class or APOConfig
        passed = {key: settings.pop(key) for key in list(settings) if key in _TRAINER_ARGUMENTS}
        config = config_class(
            **{
                "output_dir": str(tmp_path / "out"),
                "max_steps": steps,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "report_to": "none",
                "save_strategy": "no",
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                "disable_tqdm": True,
                "padding_free": False,  # so that what is compared with TRL is equal to the last bit
            }
            | settings
        )
        trainer = trainer_class(model=model or str(model_dir), args=config, train_dataset=data, **passed)
        if run:
            trainer.train()
        return trainer

    return run


_TRAINER_ARGUMENTS = {
    "ref_model",
    "eval_dataset",
    "peft_config",
    "quantization_config",
    "data_collator",
    "processing_class",
    "callbacks",
    "compute_metrics",
}


def curve(trainer, key: str = "loss") -> list[float]:
    """The logged values of one metric, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]
