"""`jaxrobust train CONFIG [--workdir DIR] [--config.a.b=v ...]`: train a network.

--then select,autoattack:linf:4/255+l2:2+l1:75,export:hub continues with a choice among saved
weights, then attacks (by default with the threat of the training) and exports (export:module:ID
adds RobustBench's entry). The total cost is estimated first; repeating the command resumes where it
stopped.

Exit codes: 0 done; 1 a fault of the program, with its traceback; 2 a mistake in the command or the
data, with one sentence on stderr; 3 the run stopped for another reason, which is printed (NaN, full
disk, the data of another host). The same command resumes after: 75 preempted (SIGTERM) and saved,
or another process of the pod is gone; 143 SIGTERM before or after training; 130 interrupted
(Ctrl-C).
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jaxrobust.runtime.commandline import arguments, functions
from jaxrobust.runtime.commandline.ending import Ending, define_host_flags, hosts
from jaxrobust.runtime.processes import launch
from jaxrobust.runtime.text import patience

_CONFIG = config_flags.DEFINE_config_file("config", None, arguments.CONFIG_HELP, lock_config=True)
_WHERE = "Where checkpoints, metrics and results go; default: runs/<config>."
_WORKDIR = flags.DEFINE_string("workdir", None, _WHERE)
_STAGES = (
    "Stages that follow training, separated by commas: select, an attack such as "
    "autoattack:linf:4/255+l2:2, export:LAYOUT or export:LAYOUT:ID."
)
_THEN = flags.DEFINE_string("then", None, _STAGES)
_COST = "Whether to first estimate the cost of a run with --then; --noestimate skips this."
_ESTIMATE = flags.DEFINE_bool("estimate", True, _COST)
_TRACED = "traces STEPS steps of each phase for XProf, after the first START steps of this run."
_PROFILE = flags.DEFINE_string("profile", None, f"START:STEPS {_TRACED}")
define_host_flags()


def main(argv: list[str]) -> None:
    """Read the flags and run the config."""
    if len(argv) > 1 or _CONFIG.value is None:
        extra = f"unexpected argument {argv[1]!r}; " if argv[1:] else ""
        remedy = "name one config as the first argument; change its keys with --config.key=value"
        arguments.stop(extra + remedy, 2)
    arguments.quiet_libraries()
    name = arguments.config_name(config_flags.get_config_filename(flags.FLAGS["config"]))
    pod, folder = hosts(), _WORKDIR.value or f"runs/{name}"
    patience.end()  # only the first host prints, and joining has its own messages
    with patience.of(patience.LOADING, here=pod is None):  # after the flags: --help needs no JAX
        from jaxrobust.report import pictures
        from jaxrobust.results.configs import refusals
        from jaxrobust.results.stages import running
        from jaxrobust.runtime.devices import profiling
        from jaxrobust.runtime.files import buckets
        from jaxrobust.training.run import run as training_run
        from jaxrobust.training.run import start_runs, stopping
        from jaxrobust.weights.store.checkpoint import DiskFull

    config, workdir, doing = _CONFIG.value, Path(folder), list[str]()  # the stages that have begun

    def again() -> str:
        stage = f"run the same command to continue with {doing[-1]}" if doing else ""
        return stage or start_runs.again(config, workdir)

    end = Ending(again)
    try:
        with end:
            workdir = buckets.opened("workdir", folder)
            profile = profiling.profile(_PROFILE.value) if _PROFILE.value else None
            if pod is not None:
                end.join(pod)
            else:
                _use(launch.cores())
            stages = running.stages(_THEN.value, config, workdir, estimate=_ESTIMATE.value)
            training_run.run(config, workdir, profile=profile, draw=pictures.of_phase)
            running.run(stages, config, workdir, begin=lambda stage: doing.append(stage.text))
    except stopping.Stopped as error:  # all hosts together
        arguments.stop(error, error.code)
    except KeyboardInterrupt:
        end(f"interrupted; {end.again()}", 130)
    except DiskFull as error:
        end(error, 3)
    except ValueError as error:
        mistakes = refusals.parts_refused(config) if pod is None and not doing else []
        end(functions.of_users(error) or _listed(error, mistakes), 2)
    except OSError as error:
        end(f"{error}. Once this is fixed, {end.again()}", 3)
    except Exception as error:
        end.fault(error, in_pod=pod is not None)
        raise


def _listed(error: Exception, mistakes: list[str]) -> str:
    """List a config's mistakes and `error`, each once: some only prefix another with a key."""
    texts = [*dict.fromkeys([str(error), *mistakes])]
    lines = [one for one in texts if not any(one in other and one != other for other in texts)]
    return "\n- ".join([f"{len(lines)} mistakes:", *lines]) if len(lines) > 1 else lines[0]


def _use(cores: int | None) -> None:
    """Train on one CPU device per core, or say why not; None: as many as JAX is configured for."""
    import jax

    from jaxrobust.runtime.text.progress import say
    from jaxrobust.training import build

    launch.patient_collectives()
    reason = cores and build.one_device(_CONFIG.value, cores)
    if cores and not reason:
        jax.config.update("jax_num_cpu_devices", cores)
    elif cores and cores > 1 and jax.default_backend() == "cpu":
        say(f"using one CPU device for all {cores} cores instead of one per core: {reason}")


if __name__ == "__main__":
    arguments.config_first()
    arguments.run(main, __doc__, usual="config workdir then estimate multihost")
