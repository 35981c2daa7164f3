"""Errors in the command line name the flag or the value that was probably meant."""

from typing import get_type_hints

import pytest

from reference import train
from reference.training.command_line import parse_command_line
from reference.training.config import TrainConfig
from reference.training.errors import UserError
from reference.training.flag_errors import ABSENT, OTHER_NAMES, check_arguments

FLAGS = {"--" + name.replace("_", "-") for name in get_type_hints(TrainConfig)}


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lr", "--learning-rate"),
        ("-lr", "--learning-rate"),
        ("--learning_rat", "--learning-rate"),
        ("--step", "--steps"),
        ("steps=3", "--steps"),
        ("---steps", "--steps"),
        ("--num_generations", "--group-size"),
        ("--num-generation", "--group-size"),
        ("--max-new", "--max-new-tokens"),
        ("--max-response-length=9", "--max-new-tokens"),
        ("--epochs", "--steps"),
        ("--batch-size", "--prompts"),
        ("--kl-coef", "--beta"),
        ("--clip", "--epsilon-low and --epsilon-high"),
        ("--epsilon", "--epsilon-low and --epsilon-high"),
        ("--no-wanb", "--no-wandb"),
        ("--prompt", "--prompts"),
        ("actor_rollout_ref.actor.optim.lr=1e-6", "--learning-rate"),
        ("data.train_files=x", "--data"),
        ("--dr-grpo", "--loss dr_grpo"),
        ("--fsdp", "--parallel fsdp"),
        ("--tiny", "--preset tiny"),
        ("--help-all", "--help all"),
    ],
)
def test_unknown_flag_suggests_the_right_one(flag, meant, capsys):
    assert train.main([flag, "3"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    given = flag.partition("=")[0]
    there_is_none = f"there is no flag {given}" if flag.startswith("-") else f"{given!r} is no flag"
    assert said == f"error: {there_is_none}; did you mean {meant}?"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--repetition-penalty 1.1", "there is no flag --repetition-penalty: a penalty would make"),
        ("--weight_decay 0", "there is no flag --weight_decay: the optimiser is AdamW without"),
        ("--bias", "there is no flag --bias; --help all lists every flag"),
        ("-x", "there is no flag -x; --help all lists every flag"),
        ("foo --steps 3", "'foo' is no flag; --help all lists every flag"),
        ("--loss gpro", "--loss gpro: expected one of grpo, one_shot, .*; did you mean grpo?"),
        ("--loss=DAPO", "--loss DAPO: expected one of .*; did you mean dapo?"),
        ("--loss None", "--loss None: expected one of grpo, .*, dro$"),
        ("--preset tin", "--preset tin: expected one of smollm2-135m, .*; did you mean tiny?"),
        ("--advantage grup", "--advantage grup: expected one of group, .*; did you mean group?"),
        ("--device gpu", "--device gpu: expected one of auto, cpu, cuda, mps"),
        ("--steps", "--steps needs a value$"),
        ("--chat=1", "--chat is on or off and takes no value; got 1$"),
        ("--steps --prompts 3", "--steps needs a value$"),
        ("--system -a", "--system needs a value; one that begins with - is written --system=-..."),
        ("--steps abc", "--steps must be an integer; got abc"),
        ("--steps 3.5", "--steps must be an integer; got 3.5"),
        ("--temperature x", "--temperature must be a number; got x"),
        ("--lora_rank x", "--lora_rank must be an integer or None; got x"),
        (
            "--checkpoint-every often",
            "--checkpoint-every must be an integer or auto or None; got often",
        ),
        (f"--seed {2**70}", f"--seed must be a number of 64 bits; got {2**70}"),
        ("--steps 3 4", "--steps takes one value; got 3 4$"),
        ("--question a b", "--question takes one value; got a b: write --question 'a b'"),
        ("--wandb true", "--wandb is on or off and takes no value; got true"),
        ("--no-wandb=x", "--no-wandb is on or off and takes no value; got x"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, said):
    with pytest.raises(UserError, match="^" + said.replace("?", r"\?")) as error:
        parse_command_line(arguments.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        "--learning_rate 3 --lora-rank None --off-policy-threshold -0.5 --no_tensorboard",
        "--system=--a --reward a.b c.d=2 --reward-weight --epsilon-low 1e-3 --advantage None",
    ],
)
def test_right_arguments_pass_the_check_and_the_parser(arguments):
    assert isinstance(parse_command_line(arguments.split()), TrainConfig)


def test_not_finite_numbers_are_values():
    check_arguments(["--off-policy-threshold", "-inf"], get_type_hints(TrainConfig))


def test_other_names_lead_to_flags_and_are_none():
    others = [name for names in (*OTHER_NAMES.values(), *ABSENT) for name in names.split()]
    assert len(set(others)) == len(others)
    assert not FLAGS & {f"--{name}" for name in others}
    for flag in OTHER_NAMES.keys() - {"--help all", "--sampler URL", "--sampler vllm"}:
        assert FLAGS.issuperset(flag.split(" and "))
