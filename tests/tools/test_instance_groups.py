"""tools/launch/instance_groups.sh, with stand-ins for gcloud and for what it finds on the hosts."""

from absl.testing import parameterized

from tests.support import clouds, sweeps

SLICE = {"TPU": "t", "ZONE": "us-east5-b", "TYPE": "v6e", "TOPOLOGY": "2x2", "BUCKET": "b"}
FLAGS = ("--config", "configs/vit_s_cvst.py", "--workdir", "../bucket/a b")
DELETES = "this deletes it: gcloud compute instance-groups managed delete"
SPECIFIC = ["--reservation-affinity", "specific", "--reservation", "r"]
PATH = "projects/p/regions/us-east5"


class InstanceGroupsTest(clouds.ScriptsTest):
    def setUp(self):
        super().setUp()
        self.checkout = clouds.Checkout(self.folder / "check out")
        self.cloud.slices(clouds.GROUPS)

    def pod(self, *codes, flags=FLAGS, **variables):
        """The exit code of the script where the run ends with `codes`, and what it says."""
        self.cloud.queue("codes", *codes)
        script = self.checkout.launch / "instance_groups.sh"
        return self.cloud.run(script, *flags, **SLICE | variables)

    def made(self, *words):
        """The arguments of these calls of gcloud."""
        calls = [call[2:] for call in self.cloud.calls("gcloud")]
        return [call[len(words) :] for call in calls if call[: len(words)] == [*words]]

    def runs(self):
        return [call[3:] for call in self.cloud.calls("run")]

    @sweeps.rows(
        *(({name: ""}, f"set {name}, ") for name in SLICE),
        ({"TYPE": "v5e"}, "TYPE=v5e is neither v5p, v6e nor v7x; write .*tpu_pod.sh"),
        ({"TOPOLOGY": "2x2x1"}, "TOPOLOGY=2x2x1 is not the shape of a v6e slice; write 2 sides"),
        ({"TOPOLOGY": "1x1"}, "TOPOLOGY=1x1 is not .*, such as 8x8"),
        ({"TYPE": "v7x"}, "TOPOLOGY=2x2 is not the shape of a v7x slice; write 3 sides, such as 4"),
        ({"SLICES": "0"}, "SLICES=0 is not a number of slices; write one"),
        ({"RUN": "test"}, "RUN=test is neither train nor evaluate; write one of them"),
        ({"CAPACITY": "free"}, "CAPACITY=free is neither spot, on-demand nor reserved; write"),
        ({"CAPACITY": "reserved"}, "set RESERVATION, the name of the reservation, in front"),
    )
    def test_is_refused(self, variables, message):
        code, said = self.pod(**variables)
        self.assertEqual(code, 2, said)
        self.assertRegex(said, f"^instance_groups.sh: {message}")
        self.assertLen(said.splitlines(), 1)
        self.assertEmpty(self.cloud.calls())

    def test_two_slices_of_two_hosts(self):
        code, said = self.pod(0, 0, 0, 0, TOPOLOGY="2x4", SLICES="2")
        self.assertEqual(code, 0, said)
        (policy,) = self.made("resource-policies", "create")
        topology = "--type HIGH_THROUGHPUT --accelerator-topology 2x4"
        mode = "--accelerator-topology-mode AUTO_CONNECT"
        words = f"workload-policy jaxrobust-2x4 --region us-east5 {topology} {mode}"
        self.assertEqual(policy, words.split())
        (template,) = self.made("instance-templates", "create")
        words = (
            "t-v6e-spot --instance-template-region us-east5 --machine-type ct6e-standard-4t "
            "--image-family ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e --image-project "
            "ubuntu-os-accelerator-images --boot-disk-size 200GB --boot-disk-type "
            "hyperdisk-balanced --maintenance-policy TERMINATE --scopes cloud-platform "
            "--provisioning-model SPOT --instance-termination-action STOP"
        )
        self.assertEqual(template, words.split())
        rest = f"--zone us-east5-b --size 2 --template {PATH}/instanceTemplates/t-v6e-spot "
        rest += "--default-action-on-vm-failure do-nothing --target-size-policy-mode bulk "
        rest += f"--workload-policy {PATH}/resourcePolicies/jaxrobust-2x4"
        groups = self.made("instance-groups", "managed", "create")
        self.assertEqual(groups, [[name, *rest.split()] for name in ("t-0", "t-1")])
        others = ["--coordinator_address", "t-0-host0:8476", "--num_processes", "4", "--process_id"]
        expected = [[*others, str(number), *FLAGS] for number in range(4)]
        self.assertCountEqual(self.runs(), expected)
        spans = [command for (*_, command) in self.made("ssh") if "-m jaxrobust.main" in command]
        for number in range(4):
            variables = "MEGASCALE_COORDINATOR_ADDRESS=t-0-host0 MEGASCALE_NUM_SLICES=2"
            start = f"NUMBER={number}; export {variables} MEGASCALE_SLICE_ID={number // 2};"
            self.assertLen([command for command in spans if command.startswith(start)], 1)
        self.assertEndsWith(said, f"{DELETES} t-0 t-1 --zone us-east5-b\n")

    @parameterized.parameters(
        ("v7x", "on-demand", ["tpu7x-standard-4t", "ubuntu-accel-2404-amd64-tpu-tpu7x"], []),
        (
            *("v5p", "reserved", ["ct5p-hightpu-4t", "pd-balanced"]),
            ["--provisioning-model", "RESERVATION_BOUND", *SPECIFIC],
        ),
    )
    def test_other_machines(self, kind, capacity, values, end):
        """One host needs no topology, and finds no others."""
        code, said = self.pod(0, TYPE=kind, TOPOLOGY="2x2x1", CAPACITY=capacity, RESERVATION="r")
        self.assertEqual(code, 0, said)
        (template,) = self.made("instance-templates", "create")
        self.assertContainsSubset(values, template)
        self.assertEqual(template[template.index("cloud-platform") + 1 :], end)
        self.assertEmpty(self.made("resource-policies", "create"))
        (group,) = self.made("instance-groups", "managed", "create")
        self.assertEqual(group[-1], "do-nothing")
        self.assertEqual(self.runs(), [[*FLAGS]])

    def test_a_preempted_slice_comes_again_alone(self):
        code, said = self.pod("75 TERMINATED", 75, 0, 0, SLICES="2", flags=("--delete", *FLAGS))
        self.assertEqual(code, 0, said)
        named = [name for name, *_ in self.made("instance-groups", "managed", "create")]
        self.assertEqual(named, ["t-0", "t-1", "t-0"])
        named = [name for name, *_ in self.made("instance-groups", "managed", "delete")]
        self.assertEqual(named, ["t-0", "t-0", "t-1"])
        self.assertEndsWith(said, "instance_groups.sh: t is deleted\n")

    def test_waits_for_all_hosts(self):
        self.cloud.queue("state", "STAGING")
        self.cloud.queue("states", "PROVISIONING", "RUNNING")
        code, said = self.pod(0)
        self.assertEqual(code, 0, said)
        for state in ("STAGING", "PROVISIONING"):
            self.assertIn(f"t is {state}; waiting", said)

    def test_a_part_that_exists_is_said(self):
        self.cloud.queue("create", "", "Quota 'TPUS_PER_TPU_FAMILY' exceeded. Limit: 4")
        code, said = self.pod(SLICES="2")
        self.assertEqual(code, 2, said)
        self.assertIn("waiting will not change this; fix it first", said)
        self.assertEndsWith(said, f"{DELETES} t-0 t-1 --zone us-east5-b\n")

    def test_ends_after_three_failures_of_one_kind(self):
        """Another last line is progress, and starts the count again."""
        self.cloud.queue("says", "step 1", "step 2", *["step 3"] * 3)
        code, said = self.pod(75, 75, 139, 139, 139)
        self.assertEqual(code, 139, said)
        self.assertLen(self.runs(), 5)
        self.assertIn(
            "the run ended 3 times in a row with exit code 139 and the same last line, without "
            "progress; fix this first: step 3\n",
            said,
        )

    @parameterized.parameters(1, 3)
    def test_ends_with_an_error_that_the_run_names(self, end):
        code, said = self.pod(75, end, TOPOLOGY="2x4")  # the other host ends because of it
        self.assertEqual(code, end, said)
        self.assertLen(self.runs(), 2)

    def test_what_hosts_say_is_in_the_bucket(self):
        self.cloud.queue("says", "step 7")
        self.assertEqual(self.pod(0)[0], 0)
        (log,) = (self.cloud.host / "bucket" / "logs" / "t").iterdir()
        self.assertEqual(log.read_text(), "step 7\n")
