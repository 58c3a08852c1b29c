"""tools/launch/tpu_pod.sh, with stand-ins for gcloud and for what it finds on the hosts."""

import shutil
import subprocess

from absl.testing import parameterized

from tests.support import clouds, sweeps

SLICE = {"TPU": "t", "ZONE": "z", "TYPE": "v5litepod-64", "VERSION": "v", "BUCKET": "b"}
FLAGS = ("--config", "configs/vit_s_cvst.py", "--workdir", "../bucket/a b")
DELETES = "this deletes it: gcloud compute tpus tpu-vm delete t --zone z"


class TpuPodTest(clouds.ScriptsTest):
    def setUp(self):
        super().setUp()
        self.checkout = clouds.Checkout(self.folder / "check out")
        self.cloud.slices()

    def pod(self, *codes, flags=FLAGS, **variables):
        """The exit code of tpu_pod.sh where the run ends with `codes`, and what it says."""
        self.cloud.queue("codes", *codes)
        script = self.checkout.launch / "tpu_pod.sh"
        return self.cloud.run(script, *flags, **SLICE | variables)

    def runs(self):
        return [call[1:] for call in self.cloud.calls("run")]

    def test_what_is_refused(self):
        for name in SLICE:
            given = {key: value for key, value in SLICE.items() if key != name}
            self.refused("tpu_pod.sh", f"set {name}, .*README", *FLAGS, **given)
        for flags in ((), ("--delete",)):
            self.refused("tpu_pod.sh", "give the flags of jaxrobust.main, such", *flags, **SLICE)
        for name, value, message in (
            ("RUN", "test", "RUN=test is neither train nor"),
            ("CAPACITY", "free", "CAPACITY=free is neither spot, on-demand nor reserved; write"),
            ("QUEUED", "1", "QUEUED=1 is neither yes nor no"),
        ):
            self.refused("tpu_pod.sh", message, *FLAGS, **SLICE | {name: value})

    def test_no_gcloud(self):
        (self.cloud.bin / "gcloud").unlink()
        (self.cloud.bin / "bash").symlink_to(shutil.which("bash"))
        path = str(self.cloud.bin)  # nothing else: this machine may have one
        self.refused("tpu_pod.sh", "gcloud is missing; install it", *FLAGS, PATH=path, **SLICE)

    def test_a_dirty_tree(self):
        (self.checkout.folder / "code.txt").write_text("changed")
        (self.checkout.folder / "new.py").write_text("")
        code, said = self.pod()
        self.assertEqual(code, 2)
        self.assertRegex(
            said, "the hosts get the last commit, .*commit, stash or remove them first"
        )
        self.assertEqual(said.splitlines()[1:], [" M code.txt", "?? new.py"])
        self.assertEmpty(self.cloud.calls())

    def test_no_checkout(self):
        shutil.rmtree(self.checkout.folder / ".git")
        code, said = self.pod(GIT_CEILING_DIRECTORIES=str(self.folder))
        self.assertEqual(code, 2)
        self.assertIn("is not a git checkout, and the hosts get their code from one", said)
        self.assertEmpty(self.cloud.calls())

    def test_runs_again_while_it_is_preempted(self):
        code, said = self.pod(75, "255 PREEMPTED", 143, "2 PREEMPTED", 0)
        self.assertEqual(code, 0, said)
        # Preempted and saved, a host lost with the slice, preempted while it compiled, another
        # error that came with a preemption, done.
        self.assertEqual(self.runs(), [["-m", "jaxrobust.main", "--multihost", *FLAGS]] * 5)
        kinds = self.cloud.kinds()
        self.assertEqual((kinds.count("create"), kinds.count("delete")), (3, 2))
        self.assertEqual(kinds.count("scp"), 5)
        (create, *_) = [call for call in self.cloud.calls("gcloud") if call[4] == "create"]
        asked = "create t --zone z --accelerator-type v5litepod-64 --version v --spot"
        self.assertEqual(create[4:], asked.split())

    @parameterized.parameters(("on-demand", []), ("reserved", ["--reserved"]), ("spot", ["--spot"]))
    def test_what_a_slice_is_paid_as(self, capacity, flags):
        code, said = self.pod(0, CAPACITY=capacity)
        self.assertEqual(code, 0, said)
        (create,) = [call for call in self.cloud.calls("gcloud") if call[4] == "create"]
        asked = "create t --zone z --accelerator-type v5litepod-64 --version v"
        self.assertEqual(create[4:], [*asked.split(), *flags])

    def test_queued(self):
        """A request waits for its slice; both go when the slice is preempted, and come again."""
        self.cloud.queue("requests", "WAITING_FOR_RESOURCES", "PROVISIONING", *["ACTIVE"] * 3)
        code, said = self.pod("75 PREEMPTED", 0, QUEUED="yes", CAPACITY="reserved")
        self.assertEqual(code, 0, said)
        for state in ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"):
            self.assertIn(f"t is {state}; waiting", said)
        calls = [call[3:] for call in self.cloud.calls("gcloud")]
        asked = "queued-resources create t --zone z --node-id t --accelerator-type v5litepod-64"
        made = [call for call in calls if call[1] == "create"]
        self.assertEqual(made, [[*asked.split(), *["--runtime-version", "v", "--reserved"]]] * 2)
        gone = ["queued-resources", "delete", "t", "--zone", "z", "--force", "--quiet"]
        self.assertEqual([call for call in calls if call[1] == "delete"], [gone])
        self.assertLen(self.runs(), 2)
        deletes = "gcloud compute tpus queued-resources delete t --zone z --force"
        self.assertEndsWith(said, f"this deletes it: {deletes}\n")

    def test_a_request_that_failed_is_made_again(self):
        for state in ("FAILED", "SUSPENDED"):
            self.cloud.queue("request", state)
            self.cloud.queue("requests", "ACTIVE")
            code, said = self.pod(0, flags=("--delete", *FLAGS), QUEUED="yes")
            self.assertEqual(code, 0, said)
            self.assertEndsWith(said, "t is deleted\n")
            self.assertFalse((self.cloud.bin / "request").exists())
        self.assertEqual(self.cloud.kinds().count("delete"), 4)

    def test_a_preempted_run_goes_on_under_the_same_versions(self):
        (self.cloud.host / "installed").write_text("jax==0.10.2\njaxlib==0.10.2\n")
        code, said = self.pod(75, 0)
        self.assertEqual(code, 0, said)
        frozen = self.cloud.host / "bucket" / "a b" / "versions.txt"
        self.assertEqual(frozen.read_text(), "jax==0.10.2\njaxlib==0.10.2\n")
        (self.cloud.host / "installed").write_text("jax==0.99\n")  # what is released meanwhile
        code, said = self.pod(0, flags=("--workdir=../bucket/a b",), RUN="evaluate")
        self.assertEqual(code, 0, said)
        self.assertEqual(frozen.read_text(), "jax==0.10.2\njaxlib==0.10.2\n")
        calls = [call[3:] for call in self.cloud.calls("python3") if call[1:3] == ["-m", "uv"]]
        installs = [call[4:] for call in calls if call[:2] == ["pip", "install"]]
        kept = ["-c", "jaxrobust/../bucket/a b/versions.txt", "-e", "jaxrobust[tpu,gcs]"]
        self.assertEqual(installs, [["venv", *kept[2:]], ["venv", *kept], ["venv", *kept]])
        freezes = [call for call in calls if call[:2] == ["pip", "freeze"]]
        self.assertEqual(
            freezes, [["pip", "freeze", "-q", "--python", "venv", "--exclude-editable"]]
        )

    def test_a_workdir_at_its_address(self):
        flags = ("--config", "configs/vit_s_cvst.py", "--workdir", "gs://b/a b")
        code, said = self.pod(75, 0, flags=flags)
        self.assertEqual(code, 0, said)
        self.assertEqual(self.runs(), [["-m", "jaxrobust.main", "--multihost", *flags]] * 2)
        self.assertTrue((self.cloud.host / "bucket" / "a b" / "versions.txt").exists())

    @sweeps.rows(
        ("evaluate", "gs://b/runs/1", "the hosts .*; give --workdir ../bucket/runs/1$"),
        (
            "train",
            "gs://c/runs/1",
            "--workdir gs://c/runs/1 is not in the bucket .*, BUCKET=b; give",
        ),
        ("evaluate", "gs://bc/1", "--workdir gs://bc/1 is not in the bucket"),
    )
    def test_addresses_that_are_refused(self, run, workdir, message):
        flags = (f"--workdir={workdir}",)
        self.refused("tpu_pod.sh", message, *flags, **SLICE | {"RUN": run, "BUCKET": "gs://b"})

    @parameterized.parameters(0, 1, 255)
    def test_ends_with_the_code_of_another_end(self, end):
        code, said = self.pod(end)
        self.assertEqual(code, end, said)
        self.assertLen(self.runs(), 1)
        self.assertEqual(self.cloud.kinds().count("delete"), 0)
        self.assertEndsWith(said, f"{DELETES}\n")

    def test_processes_of_a_lost_connection_stop_first(self):
        (self.cloud.host / "old").touch()
        code, said = self.pod(0)
        self.assertEqual(code, 0, said)
        (call,) = self.cloud.calls("pkill")
        self.assertEqual(call[1], "-TERM")
        command = "venv/bin/python -m jaxrobust.main --multihost"
        self.assertRegex(command, call[3])
        for other in (f"bash -c cd jaxrobust && {command}", command.replace(".main", ".mainly")):
            self.assertNotRegex(other, call[3])
        self.assertLen(self.runs(), 1)

    def interrupted(self, where, *flags):
        """What is said where Ctrl-C comes at this call."""
        self.cloud.queue("interrupt", where)
        self.cloud.queue("codes", 0)
        started = self.cloud.start(self.checkout.launch / "tpu_pod.sh", *flags, *FLAGS, **SLICE)
        self.cloud.queue("group", started.pid)
        _, said = started.communicate(timeout=60)
        self.assertEqual(started.returncode, 130, said)
        return said

    @parameterized.parameters(((), f"{DELETES}\n"), (("--delete",), "tpu_pod.sh: t is deleted\n"))
    def test_ctrl_c_stops_the_run_on_every_host(self, flags, end):
        said = self.interrupted("run", *flags)
        self.assertEqual(self.cloud.calls("pkill")[-1][1], "-INT")
        self.assertEqual(self.cloud.kinds()[-1], "delete" if flags else "ssh")
        self.assertEndsWith(said, end)

    @parameterized.parameters("PREEMPTED", "FAILED")
    def test_deletes_what_is_gone(self, state):
        self.cloud.queue("state", state)
        code, said = self.pod(0)
        self.assertEqual(code, 0, said)
        kinds = [kind for kind in self.cloud.kinds() if kind not in ("scp", "ssh")]
        self.assertEqual(kinds, ["describe", "delete", "describe", "create", "describe"])

    @parameterized.parameters("CREATING", "")
    def test_waits_for_any_other_state(self, state):
        self.cloud.queue("state", state)
        self.cloud.queue("states", state, "READY")
        code, said = self.pod(0)
        self.assertEqual(code, 0, said)
        self.assertEqual(said.count(f"t is {state}; waiting"), 2)
        self.assertNotIn("delete", self.cloud.kinds())
        self.assertNotIn("create", self.cloud.kinds())

    @parameterized.parameters(
        "RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded. Limit: 0 in region us-east5.",
        "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on 'projects/p'",
        "PERMISSION_DENIED: Location us-west9-z is not found or access is unauthorized.",
        "Cloud TPU received a bad request. the accelerator v5litepod-63 was not found in zone z",
        "INVALID_ARGUMENT: unknown runtime version",
        "Cloud TPU API has not been used in project p before or it is disabled.",
        "You do not currently have an active account selected. Please run: gcloud auth login",
        "The required property [project] is not currently set.",
        "unrecognized arguments: --spot",
    )
    def test_ends_where_waiting_would_not_help(self, error):
        for call in ("create", "describe"):
            self.cloud.queue(call, error)
            code, said = self.pod()
            self.assertEqual(code, 2, said)
            self.assertIn(error, said)
            self.assertEndsWith(said, "waiting will not change this; fix it first\n")
            self.assertNotIn("still exists", said)
            self.assertEmpty(self.runs())
        self.assertEqual(self.cloud.kinds(), ["describe", "create", "describe"])

    @sweeps.fast(0, 3)
    @parameterized.parameters(
        'There is no more capacity in the zone "z"; you can try in another zone',
        "Insufficient reserved capacity. Contact customer support to increase your reservation.",
        "RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Writes' and limit 'per minute'",
        "UNAVAILABLE: The service is currently unavailable.",
        "gcloud crashed (ConnectionError): HTTPSConnectionPool",
    )
    def test_goes_on_where_waiting_helps(self, error):
        self.cloud.queue("create", *[error] * 12)
        code, said = self.pod(0)
        self.assertEqual(code, 0, said)
        self.assertEqual(said.count(error), 12)
        self.assertEqual(self.cloud.kinds().count("create"), 13)

    def test_asks_ten_times_about_what_it_does_not_know(self):
        self.cloud.queue("create", *["Something else."] * 12)
        code, said = self.pod()
        self.assertEqual(code, 2)
        self.assertEndsWith(said, "gcloud failed 10 times in a row, see above; fix this first\n")
        self.assertEqual(self.cloud.kinds().count("create"), 10)

    def test_deletes_nothing_while_gcloud_cannot_say(self):
        """A run ends with its connection, and the network is away for a while."""
        self.cloud.queue("describe", "", *["gcloud crashed (ConnectionError)"] * 3)
        self.cloud.queue("state", "READY")
        code, said = self.pod(255, 0)
        self.assertEqual(code, 0, said)
        self.assertLen(self.runs(), 2)
        self.assertEqual({*self.cloud.kinds()}, {"describe", "scp", "ssh"})

    def test_a_slice_that_may_not_be_deleted(self):
        self.cloud.queue("state", "PREEMPTED")
        self.cloud.queue("delete", "PERMISSION_DENIED: Permission 'tpu.nodes.delete' denied")
        code, said = self.pod()
        self.assertEqual(code, 2)
        self.assertEndsWith(said, f"{DELETES}\n")

    @parameterized.parameters(0, 2)
    def test_deletes_the_slice_at_the_end(self, end):
        code, said = self.pod(end, flags=("--delete", *FLAGS))
        self.assertEqual(code, end, said)
        self.assertEqual(self.runs()[0][3:], [*FLAGS])
        self.assertEqual(self.cloud.kinds()[-1], "delete")
        self.assertEndsWith(said, "tpu_pod.sh: t is deleted\n")

    def test_hosts_get_the_last_commit(self):
        first = self.pod(0)
        commits = [self.on_host()]
        self.checkout.commit("more")
        self.pod(0)
        commits.append(self.on_host())
        (self.cloud.host / "jaxrobust" / "code.txt").write_text("changed there")
        last = self.checkout.commit("other", "--amend")
        self.pod(0)
        commits.append(self.on_host())
        self.assertEqual(first[0], 0)
        self.assertLen({*commits}, 3)
        self.assertEqual(commits[-1], last)
        self.assertEqual((self.cloud.host / "jaxrobust" / "code.txt").read_text(), "other")
        installs = [
            call
            for call in self.cloud.calls("python3")
            if call[1:5] == ["-m", "uv", "pip", "install"]
        ]
        self.assertEqual([call[-1] for call in installs], ["jaxrobust[tpu,gcs]"] * 3)
        self.assertLen([c for c in self.cloud.calls("python3") if "venv" in c[3:4]], 1)
        self.assertEqual(
            self.cloud.calls("gcsfuse"),
            [["gcsfuse", "--implicit-dirs", "--metadata-cache-ttl-secs=0", "b", "bucket"]],
        )

    def on_host(self):
        command = ["git", "-C", self.cloud.host / "jaxrobust", "rev-parse", "HEAD"]
        return subprocess.check_output(command, text=True).strip()

    def test_installs_gcsfuse_where_it_is_missing(self):
        (self.cloud.host / "bin" / "gcsfuse").unlink()
        for name in ("curl", "lsb_release"):
            self.cloud.program(name, f"echo {name}", host=True)
        gcsfuse = "echo 'touch bucket/mounted' >$HOME/bin/gcsfuse; chmod +x $HOME/bin/gcsfuse"
        self.cloud.program(
            "sudo", f'cat >>$HOME/written; [[ "$*" != *install* ]] || {{ {gcsfuse}; }}', host=True
        )
        if shutil.which("gcsfuse"):
            self.skipTest("gcsfuse is installed")
        code, said = self.pod(0, BUCKET="gs://b")
        self.assertEqual(code, 0, said)
        done = [call[1:] for call in self.cloud.calls("sudo")]
        self.assertEqual([call[0] for call in done], ["tee", "tee", "apt-get", "apt-get"])
        self.assertEqual(done[-1][-2:], ["install", "gcsfuse"])
        key = "/usr/share/keyrings/cloud.google.asc"
        self.assertEqual(
            (self.cloud.host / "written").read_text(),
            f"curl\ndeb [signed-by={key}] https://packages.cloud.google.com/apt "
            "gcsfuse-lsb_release main\n",
        )
        self.assertTrue((self.cloud.host / "bucket" / "mounted").exists())

    def test_a_bucket_that_cannot_be_mounted(self):
        self.cloud.program("gcsfuse", "echo no such bucket >&2; exit 1", host=True)
        code, said = self.pod(BUCKET="gs://b")
        self.assertEqual(code, 1)
        self.assertIn("no such bucket", said)
        self.assertEmpty(self.runs())
        self.assertEqual(self.cloud.calls("gcsfuse")[0][3:], ["b", "bucket"])
