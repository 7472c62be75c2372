"""`merge`: an adapter and its base become one folder that plain transformers loads."""

import json
import shutil

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from apo_trl.errors import InputError
from apo_trl.models.loading import load_model
from apo_trl.models.merge import merge

TOKENS = torch.arange(4, 40).reshape(2, 18)
CHAT = [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "It is 3"}]


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def plain(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def dtypes(folder):
    """The dtypes in the files themselves, and how many tensors were looked at."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        kinds = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118
    assert len(kinds) > 10
    return set(kinds)


@pytest.fixture
def adapter(train, tmp_path):
    """A trained LoRA adapter that moves the model visibly, and the logits of base and adapter together."""
    trainer = train(steps=6, learning_rate=2e-2, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    folder = tmp_path / "adapter"
    trainer.save_model(str(folder))
    return folder


@pytest.fixture
def expected(adapter, model_dir):
    both = logits(PeftModel.from_pretrained(plain(model_dir), str(adapter)))
    assert (both - logits(plain(model_dir))).abs().max() > 0.05
    return both


class TestMerged:
    def test_says_what_base_and_adapter_say(self, adapter, expected, tmp_path):
        folder = merge(str(adapter), str(tmp_path / "merged"))
        assert folder == tmp_path / "merged"
        assert logits(plain(folder)) == pytest.approx(expected, abs=1e-5)
        assert not list(folder.glob("adapter*"))

    def test_default_dtype_is_that_of_the_base(self, adapter, model_dir, tmp_path):
        assert dtypes(merge(str(adapter), str(tmp_path / "a"))) == {"F32"}
        make_model().to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
        folder = merge(str(adapter), str(tmp_path / "b"), base=str(tmp_path / "bf16"))
        assert dtypes(folder) == {"BF16"}
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"

    @pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
    def test_the_dtype_asked_for(self, adapter, tmp_path, dtype, stored):
        folder = merge(str(adapter), str(tmp_path / "merged"), dtype=dtype)
        assert dtypes(folder) == {stored}
        assert plain(folder, dtype="auto").dtype == getattr(torch, dtype)

    def test_the_sum_is_rounded_once(self, adapter, tmp_path):
        """A narrow merge is the exact one rounded, not a sum of rounded parts."""
        exact = load_file(merge(str(adapter), str(tmp_path / "exact")) / "model.safetensors")
        narrow = load_file(merge(str(adapter), str(tmp_path / "narrow"), dtype="bfloat16") / "model.safetensors")
        assert exact.keys() == narrow.keys()
        assert all(torch.equal(narrow[name], exact[name].bfloat16()) for name in exact)

    def test_a_checkpoint_merges_too(self, train, model_dir, tmp_path):
        train(peft_config=LoraConfig(r=4), learning_rate=2e-2, save_strategy="steps", save_steps=2)
        checkpoint = tmp_path / "out" / "checkpoint-2"
        both = logits(PeftModel.from_pretrained(plain(model_dir), str(checkpoint)))
        assert logits(plain(merge(str(checkpoint), str(tmp_path / "merged")))) == pytest.approx(both, abs=1e-5)

    def test_an_adapter_trained_on_four_bits_merges_into_the_plain_base(self, train, model_dir, tmp_path):
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        trainer = train(
            quantization_config=four_bits,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
            model_init_kwargs={"dtype": "float32"},
            learning_rate=2e-2,
        )
        trainer.save_model(str(tmp_path / "adapter"))
        folder = merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        both = PeftModel.from_pretrained(plain(model_dir), str(tmp_path / "adapter"))
        assert logits(plain(folder)) == pytest.approx(logits(both), abs=1e-5)

    def test_an_empty_folder_is_filled(self, adapter, tmp_path):
        (tmp_path / "there").mkdir()
        assert (merge(str(adapter), str(tmp_path / "there")) / "model.safetensors").is_file()

    def test_folders_above_are_made(self, adapter, tmp_path):
        assert (merge(str(adapter), str(tmp_path / "a" / "b" / "c")) / "model.safetensors").is_file()


def live(tied, rows, tmp_path, **settings):
    """The logits of a trained PEFT model in memory, whose folder is then read, with `rows` in its embeddings."""
    make_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = plain(tmp_path / "base")
    torch.manual_seed(0)
    model.resize_token_embeddings(rows)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>"] if rows > 260 else [])
    tokenizer.save_pretrained(tmp_path / "adapter")
    return logits(model)


EMBEDDINGS = {
    "none": {},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "input": {"modules_to_save": ["embed_tokens"]},
    "output": {"modules_to_save": ["lm_head"]},
    "both as one": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [5, 6]},
    "lora on the input": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora on the input": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "lora on the output": {"target_modules": ["q_proj", "lm_head"]},
    "lora on both as one": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers` to `True`",
    "ignore:You passed `ensure_weight_tying=True`", "ignore:.*ensure_weight_tying",
)  # fmt: skip
class TestAsInMemory:
    @pytest.mark.parametrize("rows", [260, 262, 320], ids=["own vocabulary", "added tokens", "added and padded"])
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    @pytest.mark.parametrize("name", EMBEDDINGS)
    def test_loaded_and_merged(self, name, tied, rows, tmp_path):
        expected = live(tied, rows, tmp_path, **EMBEDDINGS[name])
        adapter = str(tmp_path / "adapter")
        if rows > 260 and not tied and name.startswith(("lora on", "dora on")):  # PEFT saves only the layer it adapts
            with pytest.raises(
                InputError, match=r"^adapter: .* only one of its two embeddings has the \d+ added tokens"
            ):
                merge(adapter, str(tmp_path / "merged"))
            return
        assert logits(load_model(adapter, "--model")[0]) == pytest.approx(expected, abs=1e-5)
        merged = plain(merge(adapter, str(tmp_path / "merged")))
        assert logits(merged) == pytest.approx(expected, abs=1e-5)
        assert merged.get_input_embeddings().weight.shape[0] == rows

    def test_a_token_added_and_trained_alone(self, tmp_path):
        expected = live(False, 262, tmp_path, trainable_token_indices=[260, 261])
        assert logits(plain(merge(str(tmp_path / "adapter"), str(tmp_path / "merged")))) == pytest.approx(
            expected, abs=1e-5
        )

    @pytest.mark.parametrize("rows", [256, 300], ids=["longer", "shorter"])
    def test_a_tokenizer_of_another_length_than_the_embeddings(self, rows, tmp_path):
        """As it comes with some base models: nothing is resized."""
        make_model(vocab_size=rows).save_pretrained(tmp_path / "base")
        model = get_peft_model(
            plain(tmp_path / "base"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        )
        model.save_pretrained(tmp_path / "adapter")
        make_tokenizer().save_pretrained(tmp_path / "adapter")
        expected = logits(model)
        assert logits(load_model(str(tmp_path / "adapter"), "--model")[0]) == pytest.approx(expected, abs=1e-6)
        assert logits(plain(merge(str(tmp_path / "adapter"), str(tmp_path / "merged")))) == pytest.approx(
            expected, abs=1e-5
        )

    def test_biases(self, tmp_path):
        make_model(attention_bias=True).save_pretrained(tmp_path / "base")
        make_tokenizer().save_pretrained(tmp_path / "base")
        model = get_peft_model(plain(tmp_path / "base"), LoraConfig(r=4, target_modules=["q_proj"], bias="all"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += "bias" in name
        model.save_pretrained(tmp_path / "adapter")
        expected = logits(model)
        assert logits(plain(merge(str(tmp_path / "adapter"), str(tmp_path / "merged")))) == pytest.approx(
            expected, abs=1e-5
        )

    def test_nothing_of_the_reference_is_merged(self, train, adapter, expected, model_dir, tmp_path):
        """TRL saves the adapter that training started from as `ref`, beside the trained one."""
        model = PeftModel.from_pretrained(plain(model_dir), adapter, is_trainable=True)
        trainer = train(model=model, processing_class=make_tokenizer(), learning_rate=2e-2)
        trainer.save_model(str(tmp_path / "further"))
        assert (tmp_path / "further" / "ref" / "adapter_model.safetensors").is_file()
        merged = merge(str(tmp_path / "further"), str(tmp_path / "merged"))
        after = logits(trainer.model)
        assert logits(plain(merged)) == pytest.approx(after, abs=1e-5)
        assert (after - expected).abs().max() > 0.05
        assert not (merged / "ref").exists()
        assert logits(plain(merge(str(tmp_path / "further" / "ref"), str(tmp_path / "ref")))) == pytest.approx(
            expected, abs=1e-5
        )


class TestWhatComesAlong:
    def test_tokenizer_and_template(self, adapter, tmp_path):
        before = AutoTokenizer.from_pretrained(adapter)
        after = AutoTokenizer.from_pretrained(merge(str(adapter), str(tmp_path / "merged")))
        for prompt in (True, False):
            rendered = before.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
            assert after.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt) == rendered
        assert after("It is 3").input_ids == before("It is 3").input_ids
        assert (after.eos_token, after.pad_token) == (before.eos_token, before.pad_token) == ("<|end|>", "<|end|>")

    def test_the_template_of_the_adapter_goes_before_that_of_the_base(self, adapter, tmp_path):
        (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}, as trained")
        tokenizer = AutoTokenizer.from_pretrained(merge(str(adapter), str(tmp_path / "merged")))
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "Add 1 and 2., as trained"

    def test_without_one_in_the_adapter_the_tokenizer_is_that_of_the_base(self, adapter, model_dir, tmp_path):
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (adapter / name).unlink()
        tokenizer = AutoTokenizer.from_pretrained(merge(str(adapter), str(tmp_path / "merged")))
        rendered = AutoTokenizer.from_pretrained(model_dir).apply_chat_template(CHAT, tokenize=False)
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == rendered

    def test_generation_config(self, adapter, model_dir, tmp_path):
        base = shutil.copytree(model_dir, tmp_path / "base")
        wanted = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 3]}
        (base / "generation_config.json").write_text(json.dumps(wanted))
        config = plain(merge(str(adapter), str(tmp_path / "merged"), base=str(base))).generation_config
        assert {key: getattr(config, key) for key in wanted} == wanted


class TestRefused:
    """One sentence with the remedy, and nothing new on the disk."""

    @pytest.fixture(autouse=True)
    def nothing_stays(self, adapter, tmp_path):
        (tmp_path / "out").mkdir(exist_ok=True)
        before = sorted(tmp_path.iterdir())
        yield
        assert [path for path in sorted(tmp_path.iterdir()) if path not in before] == []

    def refuse(self, adapter, tmp_path, output="merged", **settings):
        with pytest.raises(InputError) as caught:
            merge(str(adapter), str(tmp_path / output), **settings)
        message = str(caught.value)
        assert "\n" not in message
        assert message.endswith(".")
        return message

    def test_a_folder_without_an_adapter(self, model_dir, tmp_path):
        assert "has no adapter_config.json and adapter_model" in self.refuse(model_dir, tmp_path)

    def test_a_folder_that_is_not_there(self, tmp_path):
        assert "has no adapter_config.json and adapter_model" in self.refuse(tmp_path / "nowhere", tmp_path)

    def test_a_damaged_config(self, adapter, tmp_path):
        (adapter / "adapter_config.json").write_text('{"r": 4,')
        assert "cannot be loaded, JSONDecodeError" in self.refuse(adapter, tmp_path)

    def test_weights_that_are_not_there(self, adapter, tmp_path):
        (adapter / "adapter_model.safetensors").unlink()
        assert "has no adapter_config.json and adapter_model" in self.refuse(adapter, tmp_path)

    def test_weights_cut_short(self, adapter, tmp_path):
        weights = adapter / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert "does not fit its base model, SafetensorError" in self.refuse(adapter, tmp_path)

    def test_a_number_that_is_none(self, adapter, tmp_path):
        weights = load_file(adapter / "adapter_model.safetensors")
        next(iter(weights.values())).fill_(float("nan"))
        save_file(weights, adapter / "adapter_model.safetensors")
        assert "NaN" in self.refuse(adapter, tmp_path)

    @pytest.mark.parametrize("named", [None, "nowhere/model"])
    def test_a_base_that_is_not_there(self, adapter, tmp_path, named):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        message = self.refuse(adapter, tmp_path)
        assert message.startswith(f"--base: {named} cannot be loaded" if named else "--base: the adapter names no base")

    def test_a_base_given_that_is_not_there(self, adapter, tmp_path):
        message = self.refuse(adapter, tmp_path, base=str(tmp_path / "nowhere"))
        assert message.startswith("--base: folder not found")
        assert "nowhere" in message

    def test_a_base_without_weights(self, adapter, model_dir, tmp_path):
        base = shutil.copytree(model_dir, tmp_path / "out" / "base")
        (base / "model.safetensors").unlink()
        assert "cannot be loaded" in self.refuse(adapter, tmp_path, base=str(base))

    def test_a_quantised_base(self, adapter, model_dir, tmp_path):
        base = shutil.copytree(model_dir, tmp_path / "out" / "base")
        config = json.loads((base / "config.json").read_text())
        quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
        assert "is quantised. Set the unquantised model" in self.refuse(adapter, tmp_path, base=str(base))

    @pytest.mark.parametrize("shape", [{"hidden_size": 64}, {"num_hidden_layers": 1}], ids=["wider", "shorter"])
    def test_another_models_adapter(self, adapter, tmp_path, shape):
        base = tmp_path / "out" / "base"
        make_model(**shape).save_pretrained(base)
        assert "does not fit its base model" in self.refuse(adapter, tmp_path, base=str(base))

    def test_the_adapter_of_a_shorter_model(self, tmp_path):
        get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "out" / "short")
        base = tmp_path / "out" / "base"
        make_model(num_hidden_layers=3).save_pretrained(base)
        assert "does not fit its base model" in self.refuse(tmp_path / "out" / "short", tmp_path, base=str(base))

    @pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga"])
    @pytest.mark.filterwarnings("ignore:`init_lora_weights` is .corda.")
    def test_a_base_that_cannot_be_changed_again(self, adapter, tmp_path, init):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": init}))
        message = self.refuse(adapter, tmp_path)
        assert f"init_lora_weights='{init}'" in message
        assert "path_initial_model_for_weight_conversion" in message

    def test_a_prompt_has_no_weights_to_merge(self, model_dir, tmp_path):
        model = get_peft_model(plain(model_dir), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        model.save_pretrained(tmp_path / "out" / "prompt")
        assert "PROMPT_TUNING has no weights to merge" in self.refuse(tmp_path / "out" / "prompt", tmp_path)

    def test_no_tokenizer_anywhere(self, adapter, tmp_path):
        base = tmp_path / "out" / "base"
        make_model().save_pretrained(base)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (adapter / name).unlink()
        assert "Put the tokenizer's files into it" in self.refuse(adapter, tmp_path, base=str(base))

    def test_a_damaged_tokenizer(self, adapter, tmp_path):
        """`tokenizers` raises a bare Exception for it."""
        (adapter / "tokenizer.json").write_text('{"added_tokens": [], "model": {}}')
        assert f"the tokenizer of {adapter} cannot be loaded, " in self.refuse(adapter, tmp_path)

    @pytest.mark.parametrize(("dtype", "meant"), [("bfloat", " Did you mean 'bfloat16'?"), ("int4", "")])
    def test_an_unknown_dtype(self, adapter, tmp_path, dtype, meant):
        message = self.refuse(adapter, tmp_path, dtype=dtype)
        assert message.endswith("Use one of float32, bfloat16, float16.")
        assert meant in message

    def test_a_folder_with_something_in_it(self, adapter, tmp_path):
        assert "is not an empty folder" in self.refuse(adapter, tmp_path, output="adapter")
        assert (adapter / "adapter_model.safetensors").is_file()

    def test_a_file_in_the_place_of_the_folder(self, adapter, tmp_path):
        (tmp_path / "out" / "file").write_text("mine")
        assert "is not an empty folder" in self.refuse(adapter, tmp_path, output="out/file")
        assert "cannot be written" in self.refuse(adapter, tmp_path, output="out/file/below")
        assert (tmp_path / "out" / "file").read_text() == "mine"

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("x")])
    def test_saving_that_breaks_off(self, adapter, tmp_path, monkeypatch, error):
        from transformers import PreTrainedTokenizerBase

        def fail(self, folder, **settings):
            assert (folder / "model.safetensors").is_file()
            raise error

        monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
        expected = InputError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected, match="No space left on device" if isinstance(error, OSError) else None):
            merge(str(adapter), str(tmp_path / "merged"))
