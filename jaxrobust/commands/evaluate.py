"""`jaxrobust evaluate TARGET [--dataset NAME] ...`: attack a network and record the result.

TARGET is a run; an imported folder (jaxrobust import); a RobustBench id or a timm id, which are
downloaded once; my_net.py:logits_fn or my_package.nets:logits_fn, a function in any library;
torch:my_net.py:build, a PyTorch network; or quickstart, a trained network that ships with the
package. A weights file also needs --model NAME. All except runs and quickstart need --dataset NAME.

Repeating the command resumes an interrupted evaluation, and prints a finished one. On a pod, start
it with --multihost on every host: they share the images, and any number of hosts can resume.

Exit codes: 0 done; 1 a fault of the program, with its traceback; 2 a mistake in the command or the
data, with one sentence on stderr; 3 it stopped for another reason, which is printed (full disk).
The same command resumes after: 75 another process of the pod is gone; 143 SIGTERM; 130 interrupted.
"""

import sys
from dataclasses import asdict
from typing import Any

from absl import flags

from jaxrobust.commands.flags import evaluation_help
from jaxrobust.commands.flags.evaluation import EvaluateFlags
from jaxrobust.evaluation.questions import mistakes, stated
from jaxrobust.runtime.commandline import fields, functions, targets
from jaxrobust.runtime.commandline.arguments import quiet_libraries, run, stop, unable
from jaxrobust.runtime.commandline.ending import Ending, define_host_flags, hosts
from jaxrobust.runtime.text import patience, terminal
from jaxrobust.weights.fetch import shipped

fields.define(EvaluateFlags)
define_host_flags()


def main(argv: list[str]) -> None:
    """Read the flags and evaluate."""
    if len(argv) > 2:
        remedy = "name one network, and pass other values as flags"
        stop(f"unexpected argument {argv[2]!r}; {remedy}", 2)
    quiet_libraries()
    pod = hosts()
    patience.end()  # only the first host prints, and joining has its own messages
    end = Ending(_again)
    try:
        with end:
            answer, first = _evaluated(end, pod, *argv[1:])
        if first:
            terminal.show(answer)
    except KeyboardInterrupt:
        end(f"interrupted; {_again()}", 130)
    except ValueError as error:
        end(functions.of_users(error) or error, 2)
    except (OSError, MemoryError) as error:
        end(f"{unable(error)}. Once this is fixed, run the same command again", 3)
    except Exception as error:
        end.fault(error, in_pod=pod is not None)
        raise


def _again() -> str:
    """Describe what repeating the command does with the verdicts so far."""
    is_cascade = getattr(sys.modules.get("jaxrobust.attacks.fixed_steps"), "is_cascade", None)
    names = [name for name in flags.FLAGS.attack.split(",") if ":" not in name]  # not the user's
    if is_cascade and names and not is_cascade(",".join(names)):
        return "run the same command to start over, because nothing was saved yet"
    return "run the same command to continue with the verdicts so far"


def _evaluated(end: Ending, pod: dict[str, Any] | None, target: str = "") -> tuple[str, bool]:
    if pod is not None:
        end.join(pod)
    values = asdict(fields.given(EvaluateFlags))
    names = ("image_size", "threat", "ladder", "radius_at")
    sizes, *threats_and_growth = (values.pop(name) for name in names)
    values["image_size"] = sizes[0] if len(sizes) == 1 else None
    without_attack = values["corruptions"] is not None or values["certify"] is not None
    if without_attack and flags.FLAGS["attack"].using_default_value:
        values["attack"] = "clean"
    elif target in shipped.RUNS and flags.FLAGS["attack"].using_default_value:
        # Compiles one program, instead of AutoAttack's four.
        values["attack"] = "sparse-pgd" if values["norm"] == "l0" else "apgd-ce"
    if target in shipped.RUNS:
        values["shipped"] = target
    elif target:
        values = targets.with_target(values, target, weights=shipped.RUNS)
    elif all(values[name] is None for name in ("workdir", "model", "weights", "function", "torch")):
        raise ValueError(
            "name a network as the first argument: a run, imported weights, an id such as "
            "Salman2020Do_R18, my_net.py:logits_fn, torch:my_models.py:build, or quickstart"
        )
    asked = stated.GivenFlags(**values)
    mistakes.check(asked, sizes, *threats_and_growth)
    with patience.of(patience.LOADING, here=pod is None):
        if not (mistakes.has_users(asked) or asked.worst_case or asked.certify is not None):
            mistakes.check_attack(asked)
        from jaxrobust.evaluation.questions import command  # after the flags: --help needs no JAX

    return command.answer(asked, sizes, *threats_and_growth)


if __name__ == "__main__":
    run(
        main,
        __doc__,
        usual=evaluation_help.USUAL,
        hint="--help-all lists the flags",
        groups=evaluation_help.GROUPS,
        describe=evaluation_help.describe_attacks,
    )
