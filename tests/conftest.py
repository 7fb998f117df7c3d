"""What the tests share: the repository on the path, a tiny miniature world, a short stage 1 on it,
and the real keyframe where it is there."""
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("CD_SHARED", ROOT.parent / "shared"))
sys.path.insert(0, str(ROOT))
# Several processes with several threads each are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The index cache in a temporary folder, for this process and those that it starts."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Root of a miniature world: 8 training scenes (4 clear, 2 rain, 2 night) and 2 validation
    layouts, one frame each."""
    from miniature.world import make_world
    root = tmp_path_factory.mktemp("world") / "data"
    make_world(root, seed=7, train=(4, 2, 2), val=2, frames=1, workers=1)
    return root


@pytest.fixture(scope="session")
def kitti(tmp_path_factory):
    """12 training streets in ten sequences, two of validation, of two frames each."""
    from miniature.world import make_world
    return make_world(tmp_path_factory.mktemp("kitti") / "data", seed=3, dataset="semantickitti",
                      train=(12, 0, 0), val=2, azimuths=200, workers=1)


@pytest.fixture(scope="session")
def panda(tmp_path_factory):
    """Two training scenes, one more without labels, and one of validation; two frames each."""
    from miniature.world import make_world
    return make_world(tmp_path_factory.mktemp("panda") / "data", seed=3, dataset="pandaset",
                      train=(2, 0, 0), val=1, azimuths=200, workers=1)


@pytest.fixture(scope="session")
def poss(tmp_path_factory):
    """Six training streets in five sequences, two of validation, of two frames each."""
    from miniature.world import make_world
    return make_world(tmp_path_factory.mktemp("poss") / "data", seed=3, dataset="semanticposs",
                      train=(6, 0, 0), val=2, azimuths=200, workers=1)


@pytest.fixture
def copy(world, tmp_path):
    """A copy of `world` that a test may damage."""
    return shutil.copytree(world, tmp_path / "copy")


@pytest.fixture(scope="session")
def first(world, tmp_path_factory):
    """Folder of a stage 1 of two steps on `world`."""
    from runs import stage1_args

    import stage1
    out = tmp_path_factory.mktemp("runs") / "s1"
    stage1.main(stage1_args(world, out, "--steps", "2"))
    return out


@pytest.fixture(scope="session")
def second(world, first, tmp_path_factory):
    """Folder of a stage 2 of two steps after `first`."""
    from runs import stage2_args

    import stage2
    out = tmp_path_factory.mktemp("runs") / "s2"
    stage2.main(stage2_args(world, first, out, "--steps", "2"))
    return out


@pytest.fixture(scope="session")
def probes(world, tmp_path_factory):
    """Folder of the folders of two probes in 2D, "seg" and "depth"."""
    from pictures import two_probes
    return two_probes(world, tmp_path_factory.mktemp("probes"))


@pytest.fixture(scope="session")
def real():
    """Root of one real nuScenes keyframe (v1.0-mini), which is not part of the repository."""
    root = SHARED / "real" / "nuscenes"
    if not root.is_dir():
        pytest.skip("no real keyframe here")
    return root
