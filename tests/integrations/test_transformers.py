"""SparsityCallback in transformers' Trainer: sparse at every step, resumed bit for bit, and models that stay what they were."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.errors import OptionError, StateError

transformers = pytest.importorskip("transformers", reason="the model zoo is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it")

from sparsefx.integrations.transformers import SparsityCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning", "ignore::FutureWarning")
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def bert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=2))
    return model


def causal_lm(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def rows(labels: bool) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(32):
        ids = torch.randint(3, 96, (8,), generator=generator)
        found.append({"input_ids": ids, "labels": (ids[0] % 2) if labels else ids})
    return found


def trainer(folder: Path, model: nn.Module, callback: Any, steps: int = 8, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=3,
        logging_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        save_total_limit=None,
        **options,
    )
    labelled = isinstance(model, transformers.BertForSequenceClassification)
    callbacks = [] if callback is None else [callback]
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows(labelled), callbacks=callbacks)


class StopAt(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
    """Ends training early, as a run that was cut short; looks at the weights at every step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        for name, mask in sparsefx.masks(given["model"]).items():
            assert not given["model"].get_parameter(name)[~mask].any()
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(
    ("build", "bf16", "algorithm"),
    [(bert, True, "magnitude"), (bert, False, "rigl"), (causal_lm, False, "magnitude"), (causal_lm, True, "rigl")],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, build: Any, bf16: bool, algorithm: str) -> None:
    def callback() -> SparsityCallback:
        return SparsityCallback(
            "2:4", sparsify_options={"algorithm": algorithm}, attach_options={"rewire_every": 2} if algorithm == "rigl" else None
        )

    options = {"bf16": bf16, "gradient_accumulation_steps": 2}
    whole = trainer(tmp_path / "whole", build(), callback(), **options)
    whole.train()
    first = trainer(tmp_path / "parts", build(), callback(), **options)
    first.add_callback(StopAt(4))
    first.train()
    second = trainer(tmp_path / "parts", build(seed=9), callback(), **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert second.state.global_step == 8
    expected, found = whole.model.state_dict(), second.model.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    one, other = sparsefx.masks(whole.model), sparsefx.masks(second.model)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(one) >= 5
    assert not any("lm_head" in name or "embed" in name for name in one)


@pytest.mark.parametrize("build", [bert, causal_lm])
def test_compiled_in_bfloat16_it_trains_sparse_and_resumes(tmp_path: Path, build: Any) -> None:
    options = {"bf16": True, "torch_compile": True, "torch_compile_backend": "aot_eager", "steps": 4}
    torch._dynamo.reset()
    first = trainer(tmp_path, build(), SparsityCallback("2:4", attach_options={"exploit": "none"}), **options)
    first.add_callback(StopAt(3))
    first.train()
    second = trainer(tmp_path, build(seed=9), SparsityCallback("2:4", attach_options={"exploit": "none"}), **options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.state.global_step == 4
    one, other = sparsefx.masks(first.model), sparsefx.masks(second.model)
    assert one.keys() == other.keys()
    assert len(one) >= 5
    # One step apart: masks have moved, but most of each is that of the checkpoint.
    assert all(float((one[name] == other[name]).float().mean()) > 0.9 for name in one)
    assert all(not second.model.get_parameter(name)[~mask].any() for name, mask in other.items())
    torch._dynamo.reset()


def test_figures_are_logged_where_loggers_see_them(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Logger(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
            seen.append(dict(logs))

    run = trainer(tmp_path, bert(), Logger(), steps=4)
    SparsityCallback("2:4", attach_options={"exploit": "none"}).add_to(run)
    run.train()
    for figures in (run.state.log_history[0], seen[0]):
        assert figures["sparsity/density"] == 0.5
        assert 0 < figures["sparsity/flips"] < 1
        assert figures["sparsity/empty_channels"] >= 0
    with pytest.raises(OptionError, match=r"expected a transformers\.Trainer"):
        SparsityCallback().add_to(bert())


def test_a_checkpoint_without_masks_is_told(tmp_path: Path) -> None:
    trainer(tmp_path, bert(), None, steps=3).train()
    run = trainer(tmp_path, bert(), SparsityCallback(), steps=6)
    with pytest.raises(
        StateError, match=r"there is no sparsefx\.safetensors in .*checkpoint-3; give SparsityCallback\(resume_from="
    ):
        run.train(resume_from_checkpoint=True)


def test_a_checkpoint_that_was_moved(tmp_path: Path) -> None:
    first = trainer(tmp_path / "here", bert(), SparsityCallback(), steps=3)
    first.train()
    (tmp_path / "here" / "checkpoint-3").rename(tmp_path / "there")
    callback = SparsityCallback(resume_from=tmp_path / "there")
    second = trainer(tmp_path / "here", bert(seed=5), callback, steps=5)
    second.train(resume_from_checkpoint=str(tmp_path / "there"))
    assert second.state.global_step == 5


def test_finalize_at_the_end_and_save_pretrained(tmp_path: Path) -> None:
    run = trainer(tmp_path, bert(), SparsityCallback("2:4", finalize_at_end=True), steps=3)
    run.train()
    assert sparsefx.masks(run.model) == {}
    run.model.save_pretrained(tmp_path / "model")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "model")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert int((again.get_parameter(name) == 0).sum()) == again.get_parameter(name).numel() // 2
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in run.model.state_dict().items())


def test_a_sparse_model_is_saved_loaded_copied_and_generates_as_ever(tmp_path: Path) -> None:
    model = sparsefx.sparsify(causal_lm(), example_inputs={"input_ids": torch.ones(1, 4, dtype=torch.long)}).eval()
    model.save_pretrained(tmp_path / "model")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    prompt = torch.tensor([[1, 5, 7]])
    words = model.generate(prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(words, again.generate(prompt, max_new_tokens=5, do_sample=False))
    assert torch.equal(words, copy.deepcopy(model).generate(prompt, max_new_tokens=5, do_sample=False))
    sparsefx.save(model, tmp_path / "sparse")
    dense = causal_lm(seed=4)
    sparsefx.load(dense, tmp_path / "sparse")
    assert torch.equal(dense(prompt).logits, model(prompt).logits)


@pytest.mark.parametrize(("accumulation", "expected"), [(1, 8), (3, 3)])
def test_an_epoch_has_the_steps_of_its_batches_however_long_the_run_is(tmp_path: Path, accumulation: int, expected: int) -> None:
    callback = SparsityCallback("unstructured", sparsify_options={"density": 0.5, "algorithm": "set"})
    told = set()

    class Look(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            assert callback.runtime is not None
            told.add(callback.runtime.report()["rewire_every"])

    run = trainer(tmp_path, bert(), callback, steps=10, gradient_accumulation_steps=accumulation)
    run.add_callback(Look())
    run.train()
    assert told == {expected}


def test_data_without_a_length_wants_to_be_told_when_an_epoch_ends(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(rows(True))

    callback = SparsityCallback("unstructured", sparsify_options={"density": 0.5, "algorithm": "set"})
    run = trainer(tmp_path, bert(), callback)
    run.train_dataset = Stream()
    with pytest.raises(OptionError, match="rewire_every="):
        run.train()
