"""Kinds of models beyond a plain text one: vision-language, quantised, prompt-learning; each with our own losses."""

import math

import pytest
import torch
from conftest import curve, make_tokenizer, rows
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig
from PIL import Image
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

from apo_trl import InputError


@pytest.fixture
def vision():
    """A tiny Llava and its processor, made in process."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}"
        "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
        image_token="<image>",
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return LlavaForConditionalGeneration(config), processor


def pictures(data):
    colours = [(250, 20, 20), (20, 250, 20), (20, 20, 250), (250, 250, 20)]
    return Dataset.from_list(
        [row | {"images": [Image.new("RGB", (16, 16), colours[i % 4])]} for i, row in enumerate(data)]
    )


class TestVision:
    def run(self, train, vision, *classes, data=None, **settings):
        import copy

        model, processor = (copy.deepcopy(part) for part in vision)
        return train(
            *classes,
            model=model,
            ref_model=copy.deepcopy(model),
            processing_class=processor,
            data=data or pictures(rows(4)),
            max_length=None,
            steps=3,
            **settings,
        )

    @pytest.mark.parametrize("name", ["apo_zero_norm", "apo_down_norm", "apo_blend"])
    def test_trains_with_our_losses(self, train, vision, name):
        losses = curve(self.run(train, vision, loss_type=name))
        assert losses[0] == pytest.approx(1.0, abs=1e-6)
        assert losses[-1] < 1

    def test_equals_trl(self, train, vision):
        theirs = self.run(train, vision, DPOTrainer, DPOConfig, loss_type="apo_zero")
        ours = self.run(train, vision, loss_type="apo_zero")
        assert curve(ours) == pytest.approx(curve(theirs), rel=1e-6)

    def test_leaves_out_pairs_that_teach_nothing(self, train, vision, caplog):
        data = rows(4)
        data[2]["chosen"] = data[2]["rejected"]
        trainer = self.run(train, vision, data=pictures(data), loss_type="apo_zero")
        assert len(trainer.train_dataset) == 3
        assert "1 of 4 pairs of the train dataset: 1 because chosen equals rejected" in caplog.text

    def test_rows_without_an_image_and_texts_beside_conversations(self, train, vision):
        """Null is no image, and the text of a prompt beside whole conversations is their user's turn."""
        data = [dict(row, images=row["images"]) for row in pictures(rows(4))]
        odd = [dict(row) for row in data]
        for row in odd:
            asked = row["prompt"]
            row["prompt"] = asked[0]["content"]
            for side in ("chosen", "rejected"):
                row[side] = asked + row[side]
        right = [row | {"images": [] if i % 2 else row["images"]} for i, row in enumerate(data)]
        odd = [row | {"images": None if i % 2 else row["images"]} for i, row in enumerate(odd)]
        settings = {"loss_type": "apo_zero_norm", "per_device_train_batch_size": 2}
        expected = self.run(train, vision, data=Dataset.from_list(right), **settings)
        assert curve(self.run(train, vision, data=Dataset.from_list(odd), **settings)) == curve(expected)

    def test_a_row_without_prompt_is_refused_before_the_first_batch(self, train, vision):
        data = [{key: value for key, value in row.items() if key != "prompt"} for row in pictures(rows(4))]
        with pytest.raises(InputError, match="Row 0 of the train dataset has no 'prompt'"):
            self.run(train, vision, data=Dataset.from_list(data))

    def test_one_image_as_a_column(self, train, vision):
        data = [dict(row) for row in pictures(rows(4))]
        single = [{**row, "image": row["images"][0] if i else None} for i, row in enumerate(data)]
        listed = [{**row, "images": row["images"] if i else []} for i, row in enumerate(data)]
        for row in single:
            del row["images"]
        expected = curve(self.run(train, vision, data=Dataset.from_list(listed)))
        assert curve(self.run(train, vision, data=Dataset.from_list(single))) == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(train, bits, model_dir, tmp_path):
    """QLoRA in one process: bitsandbytes has kernels for the CPU. The saved adapter gives the trained log-probs."""
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(
        **{f"load_in_{bits}bit": True}, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    settings = {
        "quantization_config": quantization,
        "peft_config": LoraConfig(r=4, target_modules="all-linear"),
        "model_init_kwargs": {"dtype": "float32" if bits == 4 else "bfloat16"},
        "learning_rate": 1e-2,
        "loss_type": ["apo_zero_norm", "apo_zero"],
        "beta": 1.0,
    }
    trainer = train(**settings)
    assert getattr(trainer.model, f"is_loaded_in_{bits}bit")
    losses = curve(trainer)
    assert losses[0] == pytest.approx(2.0, abs=1e-3)
    assert losses[-1] < losses[0]
    assert len(curve(trainer, "apo/chosen_up")) == len(losses) == 4

    trainer.save_model(tmp_path / "adapter")
    dtype = torch.float32 if bits == 4 else torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=quantization, dtype=dtype)

    def logits(model):
        # With gradients, as in training: the kernel for inference in 4 bits does not take matrices as small as these.
        embedded = model.get_input_embeddings()(torch.arange(40, 72).unsqueeze(0)).detach().requires_grad_()
        return model.train()(inputs_embeds=embedded).logits.detach().float()

    untrained = logits(base)
    trained = logits(trainer.model)
    assert (trained - untrained).abs().max() > 0.05
    assert (logits(PeftModel.from_pretrained(base, tmp_path / "adapter")) - trained).abs().max() < 0.02


def test_prompt_learning_shifts_nothing(train):
    """Virtual tokens stand before the real ones: lengths stay those of the completion, losses TRL's."""
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = train(DPOTrainer, DPOConfig, loss_type="apo_zero", peft_config=peft_config)
    ours = train(loss_type=["apo_zero", "apo_zero_norm"], loss_weights=[1.0, 1e-9], peft_config=peft_config)
    assert curve(ours, "loss/apo_zero") == pytest.approx(curve(theirs), rel=1e-4)
    assert all(math.isfinite(value) for value in curve(ours, "loss/apo_zero_norm"))
