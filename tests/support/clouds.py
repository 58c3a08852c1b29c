"""Stand-ins for the programs of a cloud, which note how they are called."""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from absl.testing import parameterized

from tests.support import paths

SCRIPTS = paths.ROOT / "tools" / "launch"

# A slice, its hosts (one folder stands for all of them) and what goes wrong. Beside the programs:
# `state` of the slice, and files whose lines are used up one after the other, `describe`, `create`
# and `delete` (an error of gcloud, or an empty line), `states` and `requests` (of the slice and of
# a queued resource, while the script sleeps: an ACTIVE one makes the slice), `codes`
# (with which the run ends, and perhaps the state of the slice then) and `says` (what the run prints
# before it ends). `interrupt` says at which
# call, create or run, Ctrl-C comes to the process group in `group`.
GCLOUD = """
cd "$(dirname "$0")"
next() { [ -s "$1" ] && head -n 1 "$1" && sed -i 1d "$1"; }
fails() { said=$(next "$1") && [ -n "$said" ] && echo "ERROR: (gcloud) $said" >&2; }
interrupted() {
  grep -qs "$1" interrupt && rm interrupt && kill -INT -- "-$(cat group)" && /bin/sleep 5
}
case "$*" in
  *" queued-resources describe "*)
    fails describe && exit 1
    [ -e request ] && exec cat request
    echo "ERROR: NOT_FOUND: Resource 'queuedResources/t' was not found" >&2; exit 1 ;;
  *" queued-resources delete "*) fails delete && exit 1; rm -f request state ;;
  *" queued-resources create "*) fails create && exit 1; echo ACCEPTED >request ;;
  *" describe "*)
    fails describe && exit 1
    [ -e state ] && exec cat state
    echo "ERROR: NOT_FOUND: Resource 'nodes/t' was not found" >&2; exit 1 ;;
  *" delete "*) fails delete && exit 1; rm -f state ;;
  *" create "*) interrupted create; fails create && exit 1; echo READY >state ;;
  *" scp "*) cp -f "$5" ../host/ ;;
  *" ssh "*)
    cd ../host
    HOME=$PWD PATH=$PWD/bin:$PATH bash -c "${*: -1}" ;;
esac
"""
# The same for managed instance groups, whose hosts share a folder and take turns there. `state` is
# of the hosts of the first group; `create` has a line for each group.
GROUPS = """
cd "$(dirname "$0")"
next() { [ -s "$1" ] && head -n 1 "$1" && sed -i 1d "$1"; }
of() { echo "group-$1"; }
case "$*" in
  "config get-value project") echo p ;;
  "compute resource-policies describe "*) [ -e policy ] ;;
  "compute resource-policies create "*) touch policy ;;
  "compute instance-templates describe "*) [ -e template ] ;;
  "compute instance-templates create "*) touch template ;;
  *" list-instances "*)
    [ -e "$(of "$5")" ] || { echo "ERROR: The resource '$5' was not found" >&2; exit 1; }
    state=RUNNING
    [[ $5 != *-0 || ! -e state ]] || state=$(cat state)
    sed "s/$/,$state/" "$(of "$5")" ;;
  *" managed create "*)
    said=$(next create) && [ -n "$said" ] && { echo "ERROR: (gcloud) $said" >&2; exit 1; }
    for ((n = 0; n < $9; n++)); do echo "$5-host$n"; done >"$(of "$5")" ;;
  *" managed delete "*) rm "$(of "$5")"; [[ $5 != *-0 ]] || rm -f state ;;
  "compute scp "*) exec 9>turn; flock 9; cp -f "$3" ../host/ ;;
  "compute ssh "*)
    exec 9>turn
    flock 9
    cd ../host
    HOME=$PWD PATH=$PWD/bin:$PATH bash -c "${*: -1}" 9>&- ;;
esac
"""
_SLEEP = """
cd "$(dirname "$0")"
[ ! -s states ] || { head -n 1 states >state; sed -i 1d states; }
[ ! -s requests ] || { head -n 1 requests >request; sed -i 1d requests; }
[ "$(cat request 2>/dev/null)" != ACTIVE ] || [ -e state ] || echo READY >state
"""
# On a host: `uv venv` makes the interpreter that ends with the next code.
_PYTHON = """
case "$*" in
  "-m uv venv"*)
    mkdir -p venv/bin
    cat >venv/bin/python <<'EOF'
#!/usr/bin/env bash
cd "$(dirname "$0")/../../../bin"
(flock 9; IFS=$'\\2'; printf '%s\\1' "run$IFS$*" >&9) 9>>log
grep -qs run interrupt && rm interrupt && kill -INT -- "-$(cat group)" && /bin/sleep 5
read -r code state <codes; sed -i 1d codes
[ ! -s says ] || { head -n 1 says; sed -i 1d says; }
[ -z "$state" ] || echo "$state" >state
exit "$code"
EOF
    chmod +x venv/bin/python ;;
  "-m uv pip freeze"*) cat "$HOME/installed" 2>/dev/null || echo jax==0.10.2 ;;
esac
"""


class Cloud:
    """A folder of programs that come before all others, and the log of their calls."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.host = folder / "bin", folder / "host"
        (self.host / "bin").mkdir(parents=True)
        self.bin.mkdir()

    def program(self, name: str, body: str = "", *, host: bool = False) -> None:
        """A stand-in: notes its arguments, with a 2 between them, a 1 behind, then runs `body`."""
        path = (self.host / "bin" if host else self.bin) / name
        # Programs run at once, and a shell writes a call of more than 4 KB in several pieces.
        note = f"flock 9; IFS=$'\\2'; printf '%s\\1' \"{name}${{1+$IFS$*}}\" >&9"
        note = f"({note}) 9>>'{self.bin}/log'"
        path.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
        path.chmod(0o755)

    def queue(self, name: str, *lines: object) -> None:
        (self.bin / name).write_text("".join(f"{line}\n" for line in lines))

    def slices(self, gcloud: str = GCLOUD) -> None:
        """Stand-ins for gcloud, sleep, and the programs of the hosts."""
        self.program("gcloud", gcloud)
        self.program("sleep", _SLEEP)
        self.program("python3", _PYTHON, host=True)
        self.program("mountpoint", "[ -e bucket/mounted ]", host=True)
        self.program("gcsfuse", "touch bucket/mounted", host=True)
        # The real ones would see every process of this machine.
        self.program("pgrep", "[ -e old ]", host=True)
        self.program("pkill", "rm -f old", host=True)
        self.program("sleep", 'exec /bin/sleep "$@"', host=True)

    def calls(self, *names: str) -> list[list[str]]:
        """The calls of these programs, in their order; of all if none is named."""
        log = self.bin / "log"
        calls = log.read_text().split("\1")[:-1] if log.exists() else []
        split = [call.split("\2") for call in calls]
        return [call for call in split if not names or call[0] in names]

    def kinds(self) -> list[str]:
        """The kinds of calls of gcloud: describe, create, ..."""
        return [call[4] for call in self.calls("gcloud")]

    def start(self, script: Path, *arguments: str, **variables: str) -> subprocess.Popen:
        """A script in a session of its own, in which its Ctrl-C stays."""
        # The tests may run in the background of a shell, where Ctrl-C is ignored.
        heard = ["/usr/bin/env", "--default-signal=INT"]
        return subprocess.Popen(
            [*heard, "bash", str(script), *arguments],
            cwd=paths.ROOT,
            env=os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: Path, *arguments: str, **variables: str) -> tuple[int, str]:
        """The exit code of a script, and what it says on stderr."""
        started = self.start(script, *arguments, **variables)
        _, said = started.communicate(timeout=60)
        return started.returncode, said


class Checkout:
    """A git checkout with the scripts, whose commits the hosts get."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.launch = folder, folder / "tools" / "launch"
        shutil.copytree(_first().name, folder)

    def git(self, *arguments: str) -> str:
        return git(self.folder, *arguments)

    def commit(self, text: str, *flags: str) -> str:
        (self.folder / "code.txt").write_text(text)
        self.git("add", "-A")
        self.git("commit", "-q", "-m", text, *flags)
        return self.git("rev-parse", "HEAD")


@functools.cache
def _first() -> tempfile.TemporaryDirectory:
    """Make the folder that every checkout begins as a copy of, with one commit."""
    folder = tempfile.TemporaryDirectory()
    launch = Path(folder.name) / "tools" / "launch"
    launch.mkdir(parents=True)
    for script in SCRIPTS.iterdir():
        shutil.copy(script, launch)
    (Path(folder.name) / "code.txt").write_text("code")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "code"]):
        git(Path(folder.name), *words)
    return folder


def git(folder: Path, *arguments: str) -> str:
    identity = {
        f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | identity
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


class ScriptsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.cloud = Cloud(self.folder / "cloud")

    def refused(self, script, message, *arguments, **variables):
        """With one sentence, before anything is called."""
        code, said = self.cloud.run(SCRIPTS / script, *arguments, **variables)
        self.assertEqual(code, 2, said)
        self.assertRegex(said, rf"^{re.escape(script)}: {message}")
        self.assertLen(said.splitlines(), 1)
        self.assertEmpty(self.cloud.calls())
