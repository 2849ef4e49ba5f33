# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The lock and the journal of shared statistics among processes that are killed.

``shared_host/check.cpp`` runs them without Python and without torch, so that a process
can die at any instruction, and under sanitizers.
"""

import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("g++") or shutil.which("c++")

pytestmark = [
    pytest.mark.skipif(
        not (ROOT / "csrc").exists(), reason="away from the source tree"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="uses /proc and memfd_create"),
]

CHECK = "tests/shared_host/check.cpp"
SOURCES = tuple(
    f"csrc/shared/{name}.cpp"
    for name in ("control", "identity", "robust_mutex", "record_lock")
)
CRASH_POINTS = "-DVECNORM_CRASH_POINTS"
LOCKS = {"robust mutex": (), "record lock": ("-DVECNORM_RECORD_LOCK",)}
VARIANTS = {
    "plain": ("-O2",),
    "crash points": ("-O2", CRASH_POINTS),
    "memory": (
        "-O1",
        CRASH_POINTS,
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ),
    "races": ("-O1", "-fsanitize=thread"),
}


def compile_one(source: Path, to: Path, *flags: str) -> Path:
    command = [COMPILER, "-std=c++17", "-g", "-pthread", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{ROOT}", f"-I{ROOT / 'csrc' / 'shared'}", *flags, "-c"]
    # Nobody else's: the check removes a file there.
    command += [f'-DVECNORM_LOCK_FOLDER="{to.parent}"', '-DVECNORM_BOOT_ID="boot_id"']
    result = subprocess.run(
        [*command, source, "-o", to],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return to


def link(folder: Path, *flags: str) -> Path:
    program = folder / "check"
    objects = sorted(folder.glob("*.o"))
    subprocess.run([COMPILER, "-pthread", *flags, *objects, "-o", program], check=True)
    return program


class Programs(dict):
    """The check in all variants with one kind of lock, compiled when they are wanted."""

    def __init__(self, folder: Path, lock: str) -> None:
        self.folder, self.lock = folder, lock

    def __missing__(self, variant: str) -> Path:
        folder, flags = self.folder / variant, VARIANTS[variant]
        folder.mkdir()
        with ThreadPoolExecutor(2) as pool:
            jobs = [
                pool.submit(
                    compile_one,
                    ROOT / source,
                    folder / f"{Path(source).stem}.o",
                    *flags,
                    *LOCKS[self.lock],
                )
                for source in (CHECK, *SOURCES)
            ]
            for job in jobs:
                job.result()
        self[variant] = link(folder, *flags)
        return self[variant]


@pytest.fixture(
    scope="module",
    params=["robust mutex", pytest.param("record lock", marks=pytest.mark.slow)],
)
def programs(request, tmp_path_factory) -> Programs:
    return Programs(tmp_path_factory.mktemp("shared_host"), request.param)


@pytest.fixture
def run(tmp_path):
    """Runs a program in a folder of its own, for the files that it makes."""

    def run(program: Path, *args: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [program, *map(str, args)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def passes(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    assert not result.stderr
    return result.stdout


@pytest.mark.slow
def test_crash_points(programs, run):
    """Dead at each of them, and the next one dead at each too."""
    output = passes(run(programs["crash points"], "crash"))
    deaths = re.findall(r"(?:memory|file): (\d+) deaths", output)
    assert len(deaths) == 4
    assert all(int(n) > 1000 for n in deaths)


@pytest.mark.slow
def test_kills(programs, run):
    """At any time. Some of them have to be with the lock held, or this says little."""
    output = passes(run(programs["plain"], "soak", 400))
    kills, locked, commit = re.search(
        r"(\d+) kills, of them (\d+) with the lock and (\d+) more", output
    ).groups()
    assert int(kills) == 400
    assert int(locked) + int(commit) > 0


@pytest.mark.slow
def test_kills_without_a_journal(programs, run):
    """What the kills do to statistics that are written in place."""
    result = run(programs["plain"], "soak", 10000, "--no-journal")
    assert result.returncode == 3, result.stdout + result.stderr


@pytest.mark.slow
def test_contention(programs, run):
    passes(run(programs["plain"], "contend", 8, 100000))


def test_copies_and_damage(programs, run):
    passes(run(programs["crash points"], "identity"))


@pytest.mark.slow
def test_memory(programs, run):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer."""
    for args in (("crash", "few"), ("identity",), ("contend", 4, 5000)):
        passes(run(programs["memory"], *args))


@pytest.mark.slow
def test_races(programs, run):
    """Under ThreadSanitizer."""
    passes(run(programs["races"], "threads"))


def check_is_caught(programs, run, tmp_path, lock, what, name, old, new):
    """An error that is planted in a source makes ``check what`` fail."""
    flags = VARIANTS["crash points"]
    folder = tmp_path / "mutant"
    shutil.copytree(programs["crash points"].parent, folder)
    text = (ROOT / "csrc" / "shared" / name).read_text()
    assert old in text, f"{old!r} is not there to be replaced"
    text = re.sub(rf"(?<!const ){re.escape(old)}", lambda _: new, text)
    (folder / name).write_text(text)
    compile_one(folder / name, folder / f"{Path(name).stem}.o", *flags, *lock)
    result = run(link(folder, *flags), what, *(["few"] if what == "crash" else []))
    assert result.returncode in (1, -signal.SIGABRT), result.stdout + result.stderr


LOCK_MADE_ANEW = """\
      header_->lock.init();
      VECNORM_CRASH(13);
      header_->identity.store(identity);"""

# What is planted is an error of one kind of lock.
of_the_mutex = pytest.mark.parametrize("programs", ["robust mutex"], indirect=True)


@pytest.mark.slow
@pytest.mark.parametrize("programs", ["record lock"], indirect=True)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("status.st_nlink == 0", "false", id="a removed file is the same"),
        pytest.param("made->held.clear();", "", id="a child has its parent's locks"),
    ],
)
def test_harness_catches_record_locks(programs, run, tmp_path, old, new):
    check_is_caught(
        programs,
        run,
        tmp_path,
        LOCKS["record lock"],
        "identity",
        "record_lock.cpp",
        old,
        new,
    )


@pytest.mark.slow
@of_the_mutex
@pytest.mark.parametrize(
    ("what", "name", "old", "new"),
    [
        pytest.param(
            "crash",
            "control.cpp",
            "char* at = header_->journal();",
            "header_->state = kCommitted; char* at = header_->journal();",
            id="committed before it is written",
        ),
        pytest.param(
            "crash",
            "control.cpp",
            "const char* at = header_->journal();",
            "header_->state = kClean; const char* at = header_->journal();",
            id="clean before it is published",
        ),
        pytest.param("crash", "control.cpp", "    recover();", "", id="no recovery"),
        pytest.param(
            "crash",
            "control.cpp",
            "VECNORM_CRASH(5);\n  header_->state.store(kCommitted",
            "VECNORM_CRASH(5);\n  header_->state.store(kReplaced",
            id="entries are written that nobody puts back",
        ),
        pytest.param(
            "crash",
            "control.cpp",
            "header_->state.store(kReplaced, std::memory_order_release);",
            "",
            id="an update that is finished is put back",
        ),
        pytest.param(
            "identity",
            "control.cpp",
            "== kCommitted) {\n    recover();",
            "== kCommitted) {",
            id="no recovery of a copy",
        ),
        pytest.param(
            "crash",
            "robust_mutex.cpp",
            "check(pthread_mutex_consistent(&mutex_)",
            "check(0",
            id="mutex left inconsistent",
        ),
        pytest.param(
            "identity",
            "control.cpp",
            "if (is_elsewhere()) {",
            "if (is_elsewhere() && false) {",
            id="copies are the same",
        ),
        pytest.param(
            "identity",
            "identity.cpp",
            "hash_of(boot + ' ' + where)",
            "hash_of(where + std::to_string(getpid()))",
            id="processes are not the same",
        ),
        pytest.param(
            "identity",
            "identity.cpp",
            "hash_of(boot + ' ' + where)",
            "hash_of(where)",
            id="a machine that was started anew is the same",
        ),
        pytest.param(
            "identity",
            "control.cpp",
            LOCK_MADE_ANEW,
            "\n".join(reversed(LOCK_MADE_ANEW.splitlines())),
            id="identity before the lock",
        ),
        pytest.param(
            "identity",
            "control.cpp",
            "const FileLock one_at_a_time;",
            "",
            id="two at a time",
        ),
        pytest.param(
            "identity",
            "control.cpp",
            "one_at_a_time;\n    if (is_elsewhere()) {",
            "one_at_a_time;\n    {",
            id="one after the other",
        ),
    ],
)
def test_harness_catches(programs, run, tmp_path, what, name, old, new):
    check_is_caught(programs, run, tmp_path, (), what, name, old, new)


@pytest.mark.slow
@of_the_mutex
def test_races_without_the_lock(programs, run, tmp_path, monkeypatch):
    """That ThreadSanitizer sees the memory at all."""
    flags = VARIANTS["races"]
    folder = tmp_path / "mutant"
    shutil.copytree(programs["races"].parent, folder)
    text = (ROOT / "csrc/shared/robust_mutex.cpp").read_text()
    old = "taken(pthread_mutex_timedlock(&mutex_, &until))"
    assert old in text, f"{old!r} is not there to be replaced"
    unlock = "check(pthread_mutex_unlock(&mutex_)"
    text = text.replace(old, "taken(0)").replace(unlock, "check(0")
    (folder / "robust_mutex.cpp").write_text(text)
    compile_one(folder / "robust_mutex.cpp", folder / "robust_mutex.o", *flags)
    monkeypatch.setenv("TSAN_OPTIONS", "halt_on_error=1")
    program = link(folder, *flags)
    # Threads that meet in the journal can find it damaged before they are seen.
    assert any("data race" in run(program, "threads").stderr for _ in range(20))
