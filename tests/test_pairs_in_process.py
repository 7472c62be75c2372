"""Asking models in this process: what a request is answered depends on nothing but itself."""

import json
import logging
import re
import shutil

import pytest
import torch
from conftest import TEMPLATE, make_model, make_tokenizer
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from apo_trl.errors import InputError
from apo_trl.pairs.llm.in_process import Generator, RewardModel, sampling_scores
from apo_trl.pairs.llm.reply import read_reply

REFUSING = "{% if messages[-1]['role'] == 'tool' %}{{ raise_exception('No tools') }}{% endif %}"
QUESTIONS = ["Hi", "Add 1 and 2, please.", "Why is the sky blue? " * 4, "Name a colour.", "x" * 60]


def ask(question, **settings):
    return {"messages": [{"role": "user", "content": question}], "max_tokens": 12} | settings


def encode(tokenizer, text):
    return tokenizer(text, return_tensors="pt", return_token_type_ids=False)


def text(answer):
    return answer["choices"][0]["message"]["content"]


def reason(answer):
    return answer["choices"][0]["finish_reason"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny chat model of 128 tokens that says different things, and whose folder asks for odd sampling."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 100  # where TRL begins to warn of long texts
    save(folder, make_model(max_position_embeddings=128), tokenizer)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 0.6, "top_k": 2, "top_p": 0.5, "repetition_penalty": 1.7}
    (folder / "generation_config.json").write_text(json.dumps(settings | {"max_length": 20}))
    return folder


def save(folder, model, tokenizer=None):
    with torch.no_grad():  # far from uniform, so that rounding breaks no tie
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() == 2 else 1)
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def generator(folder):
    generator = Generator(str(folder))
    generator.tokenizer.chat_template = REFUSING + TEMPLATE
    return generator


@pytest.fixture
def warnings_of_the_host():
    """What transformers says through its own logger, which no filter of Python's warnings sees."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    yield records
    logging.getLogger("transformers").removeHandler(handler)


class TestGreedy:
    def test_is_what_the_host_generates_one_by_one(self, folder, generator, warnings_of_the_host):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        warnings_of_the_host.clear()
        answers = generator.answer([ask(question, temperature=0) for question in QUESTIONS[:4]])
        assert not warnings_of_the_host
        plain = dict(do_sample=False, temperature=1.0, top_k=50, top_p=1.0, repetition_penalty=1.0)
        for question, answer in zip(QUESTIONS[:4], answers, strict=True):
            prompt = encode(tokenizer, f"<|user|>{question}<|end|><|assistant|>")
            output = model.generate(**prompt, **plain, max_new_tokens=12, max_length=None)
            size = prompt["input_ids"].shape[1]
            assert text(answer) == tokenizer.decode(output[0, size:], skip_special_tokens=True)
            assert answer["usage"]["prompt_tokens"] == size
        assert len({text(answer) for answer in answers}) == 4

    def test_loading_says_nothing(self, folder, warnings_of_the_host):
        Generator(str(folder)).answer([ask("Hi")])
        assert not warnings_of_the_host


class TestSampled:
    def test_a_text_depends_on_its_own_request_alone(self, generator):
        bodies = [
            ask(question, temperature=temperature, top_p=top_p, seed=seed, max_tokens=limit)
            for seed, (question, temperature, top_p, limit) in enumerate(
                (question, temperature, top_p, limit)
                for question in QUESTIONS
                for temperature, top_p, limit in [(0, 1, 9), (1, 1, 14), (0.7, 0.9, 5), (1.5, 0.95, 11)]
            )
        ]
        alone = [generator.answer([body])[0] for body in bodies]
        assert generator.answer(bodies) == alone
        assert generator.answer(bodies[::-1]) == alone[::-1]
        assert len({text(answer) for answer in alone}) > 15

    def test_another_seed_is_another_text(self, generator):
        first, again, second = generator.answer([ask("Hi", seed=seed) for seed in (1, 1, 2)])
        assert first == again
        assert text(first) != text(second)

    def test_without_a_seed_torch_decides(self, generator):
        state = torch.manual_seed(3).get_state()
        first = text(generator.answer([ask("Hi")])[0])
        assert text(generator.answer([ask("Hi")])[0]) != first
        torch.set_rng_state(state)
        assert text(generator.answer([ask("Hi")])[0]) == first

    def test_a_seed_leaves_torchs_own_generator_alone(self, generator):
        state = torch.get_rng_state()
        generator.answer([ask("Hi", seed=1)])
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize(
        ("temperature", "top_p", "expected"),
        [
            # The logits are the logs of 8, 4, 2, 1, 1 sixteenths.
            (1.0, 1.0, [8 / 16, 4 / 16, 2 / 16, 1 / 16, 1 / 16]),
            (0.5, 1.0, [64 / 86, 16 / 86, 4 / 86, 1 / 86, 1 / 86]),  # squares
            (1.0, 0.7, [8 / 12, 4 / 12, 0, 0, 0]),  # 8/16 < 0.7 <= 12/16
            (1.0, 0.8, [8 / 14, 4 / 14, 2 / 14, 0, 0]),  # 12/16 < 0.8 <= 14/16
            (0.5, 0.75, [64 / 80, 16 / 80, 0, 0, 0]),  # the nucleus is that of the tempered distribution: 64/86 < 0.75
            (1.0, 0.01, [1, 0, 0, 0, 0]),
            (1.0, 0.0, [1, 0, 0, 0, 0]),
            (1e-30, 1.0, [1, 0, 0, 0, 0]),
        ],
    )
    def test_the_distribution_is_the_one_asked_for(self, temperature, top_p, expected):
        # In an order that is not sorted, and at a level that must not matter.
        logits = 30 + torch.tensor([1.0, 8.0, 2.0, 4.0, 1.0]).log()
        expected = torch.tensor([expected[3], expected[0], expected[2], expected[1], expected[4]])
        draws = 20_000
        noise = torch.Generator().manual_seed(0)
        counts = torch.zeros(5)
        for _ in range(draws):
            counts[sampling_scores(logits, temperature, top_p, noise).argmax()] += 1
        possible = expected > 0
        assert counts[~possible].sum() == 0
        # Chi-square with at most 4 degrees of freedom is above 23.5 once in ten thousand.
        wanted = draws * expected[possible]
        assert ((counts[possible] - wanted) ** 2 / wanted).sum() < 23.5

    def test_noise_without_end_chooses_nothing_outside_the_nucleus(self, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator=None: self.zero_())
        scores = sampling_scores(torch.tensor([0.0, 9.0, 1.0]), 1.0, 0.5)
        assert scores.isfinite().tolist() == [False, True, False]
        assert scores.argmax() == 1

    def test_the_first_token_over_many_seeds(self, folder):
        # Through the whole path, where each seed draws from a generator of its own.
        generator = Generator(str(folder), batch_size=256)
        tokenizer = generator.tokenizer
        prompt = encode(tokenizer, "<|user|>Hi<|end|><|assistant|>")
        with torch.no_grad():
            expected = (generator.model(**prompt).logits[0, -1] / 0.8).softmax(-1)
        names = [tokenizer.decode([token], skip_special_tokens=True) for token in range(260)]
        # Only letters stand for themselves; the bytes of longer characters share one replacement.
        clear = {name: token for token, name in enumerate(names) if name.isascii() and name.isprintable() and name}
        draws = 4096
        answers = generator.answer([ask("Hi", temperature=0.8, max_tokens=1, seed=seed) for seed in range(draws)])
        counts = torch.zeros(261)
        for answer in answers:
            counts[clear.get(text(answer), 260)] += 1
        kept = [token for token in clear.values() if draws * expected[token] >= 5]
        assert len(kept) > 10
        wanted = draws * expected[kept]
        rest = draws - wanted.sum()
        chi = ((counts[kept] - wanted) ** 2 / wanted).sum() + (draws - counts[kept].sum() - rest) ** 2 / rest
        # Its mean is the degrees of freedom k, its deviation sqrt(2 k): five of them above the mean.
        assert chi < len(kept) + 5 * (2 * len(kept)) ** 0.5


def always(token, **config):
    """A model that says one token, whatever it reads."""
    model = make_model(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1 if parameter.dim() == 1 else 0)
        model.model.embed_tokens.weight.fill_(1)
        model.lm_head.weight[token] = 1
    return model


class TestEnd:
    def test_stop_counts_the_end_token_and_leaves_it_out(self, tmp_path):
        always(0).save_pretrained(tmp_path)
        tokenizer = make_tokenizer()
        begin = processors.TemplateProcessing(single="<|system|> $A", special_tokens=[("<|system|>", 1)])
        tokenizer.backend_tokenizer.post_processor = begin  # the chat template alone says what comes first
        tokenizer.save_pretrained(tmp_path)
        (answer,) = Generator(str(tmp_path)).answer([ask("Hi", temperature=0)])
        assert answer == {
            "choices": [{"message": {"role": "assistant", "content": ""}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 1},
        }

    def test_every_end_token_of_the_model_ends(self, tmp_path):
        model, tokenizer = always(100), make_tokenizer()
        tokenizer.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
        (answer,) = Generator(str(tmp_path)).answer([ask("Hi", temperature=0)])
        assert (text(answer), reason(answer)) == (tokenizer.decode([100]) * 12, "length")
        assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 12}
        model.generation_config.eos_token_id = [0, 7, 100]
        model.save_pretrained(tmp_path)
        (answer,) = Generator(str(tmp_path)).answer([ask("Hi", temperature=0)])
        assert (text(answer), reason(answer)) == ("", "stop")

    def test_the_end_token_of_the_tokenizer_ends(self, tmp_path):
        tokenizer = make_tokenizer()
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(100)
        always(100).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        (answer,) = Generator(str(tmp_path)).answer([ask("Hi", temperature=0)])
        assert (text(answer), reason(answer)) == ("", "stop")

    def test_a_batch_is_over_when_its_last_row_is(self, generator, monkeypatch):
        bodies = [ask("Hi", seed=seed, temperature=3, max_tokens=40) for seed in range(64)]
        ended = [
            (answer["usage"]["completion_tokens"], body)
            for body, answer in zip(bodies, generator.answer(bodies), strict=True)
            if answer["usage"]["completion_tokens"] < 40
        ]
        early, late = (choose(ended, key=lambda each: each[0]) for choose in (min, max))
        assert early[0] < late[0]
        generate, steps = generator.model.generate, []

        def counted(input_ids, **settings):
            output = generate(input_ids=input_ids, **settings)
            steps.append(output.shape[1] - input_ids.shape[1])
            return output

        monkeypatch.setattr(generator.model, "generate", counted)
        generator.answer([early[1], late[1]])
        assert steps == [late[0]]

    def test_each_row_ends_at_its_own_limit(self, generator):
        # Finished rows are filled with the pad token, which is the end token here: no reason to say "stop".
        limits = [1, 20, 3, 7, 12]
        answers = generator.answer([ask("Hi", temperature=0, max_tokens=limit) for limit in limits])
        assert [answer["usage"]["completion_tokens"] for answer in answers] == limits
        assert [reason(answer) for answer in answers] == ["length"] * 5
        assert all(text(answers[1]).startswith(text(answer).rstrip("\ufffd")) for answer in answers)

    def test_without_a_limit_it_is_1024_or_the_rest_of_the_context(self, generator, tmp_path):
        body = {"messages": ask("Hi")["messages"], "temperature": 0}
        (answer,) = generator.answer([body])
        assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 123}
        always(100, max_position_embeddings=2048).save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        (answer,) = Generator(str(tmp_path)).answer([body])
        assert answer["usage"]["completion_tokens"] == 1024

    def test_no_row_is_carried_out_of_the_context(self, tmp_path):
        # GPT-2 looks positions up in a table: one too many and the whole batch fails.
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        shape = dict(vocab_size=260, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        generator = Generator(save(tmp_path, GPT2LMHeadModel(GPT2Config(**shape))))
        bodies = [ask("x" * size, temperature=0, max_tokens=99) for size in (50, 1, 30, 2)]
        answers = generator.answer(bodies)
        assert answers == [generator.answer([body])[0] for body in bodies]
        assert all(reason(answer) == "stop" or sum(answer["usage"].values()) == 64 for answer in answers)


class TestThoughts:
    """Special tokens are left out of the text, but not those that mark thoughts."""

    @pytest.fixture
    def says(self, tmp_path, monkeypatch):
        def reply(written, template=TEMPLATE):
            tokenizer = make_tokenizer()
            marks = [
                "<think>",
                "</think>",
                "[THINK]",
                "[/THINK]",
                "<|channel|>",
                "<|message|>",
                "<|start|>",
                "<|next|>",
            ]
            tokenizer.add_special_tokens({"additional_special_tokens": marks})
            tokenizer.chat_template = template
            model = make_model(vocab_size=len(tokenizer))
            generator = Generator(save(tmp_path, model, tokenizer))
            tokens = torch.tensor([tokenizer(written + "<|end|>", add_special_tokens=False)["input_ids"]])
            generate = lambda input_ids, **_: torch.cat([input_ids, tokens], 1)  # noqa: E731
            monkeypatch.setattr(generator.model, "generate", generate)
            return read_reply(generator.answer([ask("Hi", max_tokens=200)])[0])

        return reply

    @pytest.mark.parametrize(
        "written",
        [
            "<think>Hm.</think>\n\nFour.<|next|>", "[THINK]Hm.[/THINK]Four.", "Hm.\n</think>\nFour.",
            "<|channel|>analysis<|message|>Hm.<|next|><|start|>assistant<|channel|>final<|message|>Four.",
        ],
    )  # fmt: skip
    def test_are_taken_off(self, says, written):
        reply = says(written)
        assert (reply.text, reply.finish) == ("Four.", "stop")
        assert "Hm." in reply.thoughts

    def test_that_the_chat_template_begins_may_have_no_end(self, says):
        thinking = TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")
        assert says("Hm.", thinking)[::3] == ("", "Hm.")
        assert says("Hm.</think>Four.", thinking)[::3] == ("Four.", "Hm.")


class TestRefused:
    @pytest.mark.parametrize(
        ("bad", "words"),
        [
            (ask("x" * 125), "^messages: .*128"),
            (ask("Hi", messages=[{"role": "tool", "content": "x"}]), "chat template .*No tools"),
            (ask("Hi", top_k=3), "^top_k: not supported"),
        ],
    )
    def test_alone(self, generator, bad, words, warnings_of_the_host):
        good = [ask("Hi", temperature=0), ask(QUESTIONS[1], seed=4)]
        first, refused, last = generator.answer([good[0], bad, good[1]])
        assert refused.keys() == {"error"}
        assert re.search(words, refused["error"]["message"])
        assert [first, last] == generator.answer(good)
        assert not warnings_of_the_host

    def test_nothing_asked(self, generator):
        assert generator.answer([]) == []


class TestMemory:
    @pytest.fixture
    def small(self, folder, monkeypatch):
        """A generator whose device holds two requests at once, or what `holds` says."""
        generator = Generator(str(folder), batch_size=8)
        generate, generator.sizes, generator.holds = generator.model.generate, [], lambda batch: len(batch) <= 2

        def limited(input_ids, **settings):
            generator.sizes.append(len(input_ids))
            if not generator.holds(input_ids):
                raise torch.cuda.OutOfMemoryError("out of memory")
            return generate(input_ids=input_ids, **settings)

        monkeypatch.setattr(generator.model, "generate", limited)
        return generator

    def test_running_out_halves_the_batch_and_changes_no_text(self, small, generator, caplog):
        bodies = [ask(question, seed=seed) for seed in range(2) for question in QUESTIONS[:4]]
        assert small.answer(bodies) == generator.answer(bodies)
        assert small.sizes == [8, 4, 2, 2, 2, 2]
        assert small.answer(bodies[:3]) == generator.answer(bodies[:3])
        assert small.sizes[6:] == [2, 1]
        assert [record.args for record in caplog.records] == [(small.name, 8, 4), (small.name, 4, 2)]

    def test_what_does_not_fit_alone_is_refused_alone(self, small):
        small.holds = lambda batch: batch.shape[1] < 60
        answers = small.answer([ask("x" * 60, seed=0), ask("Hi", seed=0)])
        assert "memory" in answers[0]["error"]["message"]
        assert text(answers[1])


class TestLoading:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(InputError, match=r"model: folder not found, got .*nowhere'"):
            Generator(str(tmp_path / "nowhere"))

    @pytest.mark.parametrize(
        ("settings", "words"),
        [({"dtype": "bfloat61"}, "be loaded, .*bfloat61"), ({"device": "abacus"}, "be loaded, .*abacus")],
    )
    def test_settings_that_do_not_exist(self, folder, settings, words):
        with pytest.raises(InputError, match=words):
            Generator(str(folder), **settings)

    def test_a_cpu_computes_in_float32_what_is_stored_in_less(self, tmp_path):
        always(2).to(torch.bfloat16).save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        generator = Generator(str(tmp_path))
        assert generator.model.dtype == torch.float32
        assert Generator(str(tmp_path), dtype="auto").model.dtype == torch.bfloat16
        (answer,) = generator.answer([ask("Hi", temperature=0)])
        assert (text(answer), reason(answer)) == ("", "length")  # "<|user|>" twelve times: special tokens are no text

    def test_dtype(self, folder, generator):
        assert generator.model.dtype == torch.float32
        other = Generator(str(folder), dtype="bfloat16")
        assert other.model.dtype == torch.bfloat16
        assert text(other.answer([ask("Hi", seed=1)])[0])

    @pytest.mark.parametrize("kind", [Generator, RewardModel])
    def test_no_chat_template(self, kind, tmp_path):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = None
        model = make_model() if kind is Generator else classifier()
        with pytest.raises(InputError, match=r"model: .* has no chat template\. Add a chat_template\.jinja"):
            kind(save(tmp_path, model, tokenizer))

    def test_weights_that_are_missing(self, model_dir, tmp_path):
        from safetensors.torch import load_file, save_file

        broken = shutil.copytree(model_dir, tmp_path / "broken")
        weights = load_file(broken / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"model: .* has no weights for model\.norm\.weight"):
            Generator(str(broken))

    @pytest.mark.parametrize("own", [True, False], ids=["with a tokenizer", "without"])
    def test_an_adapter(self, folder, generator, tmp_path, own):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        model.save_pretrained(tmp_path)
        if own:
            make_tokenizer().save_pretrained(tmp_path)
        adapted = Generator(str(tmp_path))
        body = ask("Hi", temperature=0)
        merged = tmp_path / "merged"
        model.merge_and_unload().save_pretrained(merged)
        make_tokenizer().save_pretrained(merged)
        assert text(adapted.answer([body])[0]) == text(Generator(str(merged)).answer([body])[0])
        assert text(adapted.answer([body])[0]) != text(generator.answer([body])[0])


def classifier(**config):
    torch.manual_seed(0)
    base = make_model().config
    base.update({"num_labels": 1, "max_position_embeddings": 128} | config)
    return LlamaForSequenceClassification(base)


def conversation(answer):
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]


def rewards(reward, talks):
    """The rewards of conversations, None for those that are refused."""
    answers = reward.answer([{"messages": talk} for talk in talks])
    return [None if "error" in answer else float(text(answer)[2:-2]) for answer in answers]


TALKS = [conversation(answer) for answer in ("Hello", "a" * 70, "", "Go away! " * 5, "Hi", "b")]


class TestReward:
    @pytest.fixture(params=["pad token", "no pad token"])
    def reward(self, request, tmp_path):
        config = {} if request.param == "pad token" else {"pad_token_id": None}
        return RewardModel(save(tmp_path, classifier(**config)), batch_size=4)

    def test_is_the_logit_of_the_conversation_alone(self, reward, tmp_path, warnings_of_the_host):
        model = LlamaForSequenceClassification.from_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        scores = rewards(reward, TALKS)
        assert len(set(scores)) == 6
        for talk, score in zip(TALKS, scores, strict=True):
            whole = "".join(f"<|{message['role']}|>{message['content']}<|end|>" for message in talk)
            with torch.no_grad():
                assert score == pytest.approx(model(**encode(tokenizer, whole)).logits.item(), abs=1e-5)
        assert not warnings_of_the_host

    def test_does_not_depend_on_its_batch(self, reward):
        scores = rewards(reward, TALKS)
        assert [rewards(reward, [talk])[0] for talk in TALKS] == pytest.approx(scores, abs=1e-5)
        assert rewards(reward, TALKS[::-1]) == pytest.approx(scores[::-1], abs=1e-5)
        assert max(scores) - min(scores) > 0.01

    def test_too_long_is_none(self, reward, warnings_of_the_host):
        long = conversation("x" * 130)
        scores = rewards(reward, [long, TALKS[0], long, TALKS[1]])
        assert scores == [
            None,
            *[pytest.approx(score, abs=1e-5) for score in rewards(reward, [TALKS[0]])],
            None,
            scores[3],
        ]
        assert scores[3] is not None
        assert not warnings_of_the_host

    def test_the_length_of_the_tokenizer_is_a_limit_too(self, tmp_path):
        tokenizer = make_tokenizer()
        tokenizer.model_max_length = 11
        reward = RewardModel(save(tmp_path, classifier(), tokenizer))
        # <|user|> H i <|end|> <|assistant|> H e l l o <|end|> are 11 tokens.
        first, second = rewards(reward, [conversation("Hello"), conversation("Hello!")])
        assert first is not None
        assert second is None

    def test_out_of_memory_halves_the_batch(self, reward, monkeypatch, caplog):
        expected, forward = rewards(reward, TALKS), reward.model.forward

        def limited(input_ids, **settings):
            if len(input_ids) > 1:
                raise torch.cuda.OutOfMemoryError("out of memory")
            return forward(input_ids=input_ids, **settings)

        monkeypatch.setattr(reward.model, "forward", limited)
        assert rewards(reward, TALKS) == pytest.approx(expected, abs=1e-5)
        assert [record.args[1:] for record in caplog.records] == [(4, 2), (2, 1)]

    def test_an_encoder(self, tmp_path):
        from transformers import BertConfig, BertForSequenceClassification

        shape = dict(vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        config = BertConfig(**shape, max_position_embeddings=128, num_labels=1, pad_token_id=0)
        torch.manual_seed(0)
        reward = RewardModel(save(tmp_path, BertForSequenceClassification(config)))
        scores = rewards(reward, TALKS)
        assert [rewards(reward, [talk])[0] for talk in TALKS] == pytest.approx(scores, abs=1e-5)
        assert max(scores) - min(scores) > 0.001

    def test_two_labels(self, tmp_path):
        with pytest.raises(InputError, match=r"model: .* has 2 labels\. Set one with num_labels=1"):
            RewardModel(save(tmp_path, classifier(num_labels=2)))

    def test_a_language_model_is_no_reward_model(self, model_dir):
        with pytest.raises(
            InputError, match=r"has no weights for score\.weight. Set a complete AutoModelForSequenceClassification"
        ):
            RewardModel(str(model_dir))

    def test_a_template_that_refuses(self, reward):
        reward.tokenizer.chat_template = REFUSING + TEMPLATE
        score, refused = reward.answer([{"messages": TALKS[0]}, {"messages": [{"role": "tool", "content": "x"}]}])
        assert text(score).startswith("[[")
        assert "messages: not supported by the chat template" in refused["error"]["message"]

    def test_nothing(self, reward):
        assert rewards(reward, []) == []

    def test_an_answer_is_a_score_as_a_judge_writes_it(self, reward):
        score, long = reward.answer([{"messages": TALKS[0]}, {"messages": conversation("x" * 130)}])
        assert re.fullmatch(r"\[\[-?[0-9.e-]+\]\]", text(score))
        assert reason(score) == "stop"
        assert "longer than" in long["error"]["message"]
