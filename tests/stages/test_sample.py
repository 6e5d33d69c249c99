import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from nanogpt.corpus.tokenizer import Gpt2Tokenizer
from nanogpt.nanogpt_checkpoint import save_nanogpt, to_nanogpt
from nanogpt.pretrained import GPT2_REVISIONS
from nanogpt.saved_model import save_model
from stages.sample import main
from tests.nanogpt import tiny
from tracking import report

REPOSITORY = Path(__file__).parents[2]
LINE = "-" * 80
GREEDY = ["--temperature", "0", "--num-samples", "1", "--max-new-tokens", "7"]


@pytest.fixture
def folder(project, monkeypatch) -> Path:
    """A working directory with a model of twelve letters; nothing is sent to MLflow."""
    monkeypatch.setattr(report, "report", lambda *arguments: None)
    folder = project(
        **{
            "numerics.determinism": "off",
            "numerics.threads": 1,
            "runtime.device": "cpu",
            "sample.max_new_tokens": 12,
            "sample.num_samples": 2,
            "sample.prompts": ["abc", "FILE:inputs/prompts/one.txt"],
        }
    )
    tiny.char_tokenizer(folder / "tokenizer.json")
    model = tiny.gpt(seed=1, std=0.5, bias=False)
    save_model(folder / "model", model.config, tiny.weights(model), folder / "tokenizer.json", {})
    (folder / "inputs/prompts").mkdir(parents=True)
    (folder / "inputs/prompts/one.txt").write_text("jig\n")
    return folder


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    return result


def texts(*arguments: str) -> list[str]:
    """The printed texts, each a prompt and its continuation."""
    return run(*arguments).stdout.removesuffix(f"\n{LINE}\n").split(f"\n{LINE}\n")


def test_the_stage_continues_the_prompts_of_params_and_says_so(folder):
    assert run().stdout == "sample: 4 samples -> samples/samples.md\n"
    samples = json.loads((folder / "samples/samples.json").read_text())
    assert [(s["prompt"], s["sample"]) for s in samples] == [("abc", 0), ("abc", 1), ("jig\n", 0), ("jig\n", 1)]
    page = (folder / "samples/samples.md").read_text()
    assert all(f"~~~text\n{s['prompt']}{s['text']}\n~~~" in page for s in samples)
    assert texts("--seed", "1337") == [s["prompt"] + s["text"] for s in samples]


@pytest.mark.parametrize("option", [["--seed", "1"], ["--prompt", "a"], ["--stream"], ["--model", "other"]])
def test_with_an_option_nothing_is_written(folder, option):
    shutil.copytree(folder / "model", folder / "other")
    run(*option)
    assert not (folder / "samples").exists()


def test_the_seed_decides_and_a_batch_equals_single_samples(folder):
    three = texts("--prompt", "abc", "--num-samples", "3", "--seed", "5")
    assert len(set(three)) == 3
    assert texts("--prompt", "abc", "--num-samples", "3", "--seed", "5") == three
    assert texts("--prompt", "abc", "--num-samples", "1", "--seed", "5") == three[:1]
    assert texts("--prompt", "abc", "--num-samples", "3", "--seed", "6") != three
    assert run("--prompt", "abc", "--stream", "--seed", "5").stdout == three[0] + "\n"


def test_a_prompt_file_given_as_an_option_may_be_anywhere(folder):
    (folder / "mine.txt").write_text("jab")
    assert texts("--prompt", "FILE:mine.txt", *GREEDY) == texts("--prompt", "jab", *GREEDY)
    (folder / "mine.txt").write_bytes(b"ja\xff")
    assert "mine.txt is not UTF-8 text (byte 2)" in run("--prompt", "FILE:mine.txt", code=1).stderr


def test_a_prompt_file_of_the_pipeline_is_in_inputs_prompts(folder):
    path = folder / "params.yaml"
    path.write_text(path.read_text().replace("FILE:inputs/prompts/one.txt", "FILE:params.yaml"))
    assert "sample.prompts = FILE:params.yaml is not in inputs/prompts/" in run(code=1).stderr
    assert not (folder / "samples").exists()


# --- models of others -------------------------------------------------------------------------------------------------

PROMPT = "Once upon a time"


def hugging_face(directory: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return model


def greedy(model) -> str:
    """What transformers writes after the prompt."""
    tokenizer = Gpt2Tokenizer()
    prompt = torch.tensor([tokenizer.encode(PROMPT).astype("int64").tolist()])
    with torch.no_grad():
        tokens = model.generate(prompt, max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=None)
    return tokenizer.decode(tokens[0].tolist())


def test_gpt2_from_the_hub_or_a_directory_gives_the_text_of_transformers(folder, gpt2_files):
    home = Path(os.environ["HF_HOME"]) / "hub"  # where transformers looks for what it has downloaded
    place = home / "models--openai-community--gpt2" / "snapshots" / GPT2_REVISIONS["gpt2"]
    try:
        expected = greedy(hugging_face(place))
        assert texts("--model", "gpt2", "--prompt", PROMPT, *GREEDY) == [expected]
        assert texts("--model", f"hf:{place}", "--prompt", PROMPT, *GREEDY) == [expected]
    finally:
        shutil.rmtree(home, ignore_errors=True)
    assert len(expected) > len(PROMPT)
    assert not (folder / "samples").exists()


def test_a_checkpoint_of_nanogpt_with_gpt2s_padded_vocabulary(folder, gpt2_files):
    model = tiny.gpt(seed=1, std=0.5, vocab_size=50304)
    save_nanogpt(to_nanogpt(model.config, tiny.weights(model)), folder / "ckpt.pt")
    (text,) = texts("--model", "nanogpt:ckpt.pt", "--prompt", PROMPT, *GREEDY)
    tokens = Gpt2Tokenizer().encode(PROMPT).astype("int64").tolist()
    with torch.no_grad():
        following = model(torch.tensor([tokens]))[0, -1, :50257].argmax()
    assert text.startswith(PROMPT + Gpt2Tokenizer().decode([int(following)]))


def test_a_checkpoint_with_another_vocabulary_is_rejected_with_the_remedy(folder):
    model = tiny.gpt()
    save_nanogpt(to_nanogpt(model.config, tiny.weights(model)), folder / "ckpt.pt")
    error = run("--model", "nanogpt:ckpt.pt", "--prompt", "a", code=1).stderr
    assert "--model nanogpt:ckpt.pt has a vocabulary of 13 and no tokenizer" in error
    assert "train.init_from = nanogpt:ckpt.pt with train.eval_only = true" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["--stream"], ["--num-samples", "9"]])
def test_a_closed_output_ends_it_silently(folder, arguments):
    """As with `| head`; click and Python's own flush at the end would each have a word to say."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "stages.sample", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == ""
