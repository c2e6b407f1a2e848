"""torchrun with meaningful exit codes: ``python -m decoct.launch.jobs.agent <torchrun's own arguments>``.

torchrun itself ends with 1 and a traceback whatever happened. A scheduler that requeues preempted jobs but not faulty ones needs more: 2
is a user error, 3 a failed gate, 130 Ctrl-C, 143 SIGTERM, 1 a crash after the last restart.
"""

import logging
import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun's agent and return the exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    from ...models.common.terminal_text import printable
    from ..run.counts import check_processes
    from ..run.processes import exit_code, forget_outcome, tell_killed
    from ..terminal.boundary import bug_report, ending_of

    # the workers have already reported the error; the agent would add its own traceback
    for name in ("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    given = run.parse_args(list(sys.argv[1:] if arguments is None else arguments))
    try:
        # it may also be 'auto', 'gpu' or 'cpu', which torchrun fits to the machine
        if str(given.nproc_per_node).isdigit():
            check_processes(int(given.nproc_per_node))
        run.run(given)
    except ChildFailedError as failure:
        tell_killed(failure)
        return exit_code(failure, given.rdzv_id)[0]
    except SignalException as stopped:
        # as a shell counts: 128 and the number of the signal
        return 128 + int(stopped.sigval)
    except RendezvousError as error:
        told = "start the job again on all nodes, it continues from the last checkpoint"
        print(f"decoct: the first node, where the others meet, cannot be reached ({error}); {told}", file=sys.stderr, flush=True)
        return 1
    except Exception as error:
        ending = ending_of(error)
        print(printable(f"decoct: error: {ending.message}" if ending else bug_report(error)), file=sys.stderr, flush=True)
        return ending.code if ending else 1
    # the number of this process may come again; the next agent with it must not find this outcome
    finally:
        forget_outcome(os.getpid(), given.rdzv_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
