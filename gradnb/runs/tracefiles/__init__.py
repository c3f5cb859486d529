"Traces on disk: rows while a run goes on, Arrow when it is over."
from gradnb.runs.tracefiles.arrow import Sound, compact, is_copy, open_trace, read_arrow, sound_trace, trace_files, trace_names
from gradnb.runs.tracefiles.rows import Stored, TraceLayout, TraceWriter, file_name, read_rows, read_trace, trace_name, write_rows

__all__ = ["Sound", "Stored", "TraceLayout", "TraceWriter", "compact", "file_name", "is_copy", "open_trace", "read_arrow", "read_rows", "read_trace",
           "sound_trace", "trace_files", "trace_name", "trace_names", "write_rows"]
