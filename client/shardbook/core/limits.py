"""Every limit of the formats and calls, in one place.

A request or file beyond a limit is refused with an error that names the limit; nothing is cut off silently.
"""

from __future__ import annotations

#: Largest value of any count, offset, size, step or number: what int64 holds.
INT64_MAX = 2**63 - 1
#: Largest attempt number: what the wire's int32 holds.
MAX_ATTEMPT = 2**31 - 1
#: Longest fqn, in bytes of UTF-8: DCP knows no limit, and this is several times what anybody has ever had.
MAX_FQN_BYTES = 64 << 10
#: Most dimensions of a tensor (torch's own limit).
MAX_NDIM = 64
#: Most ranks of one save.
MAX_WORLD_SIZE = 1 << 20
#: Most entries (tensors and bytes entries) in one rank's table.
MAX_ENTRIES = 1 << 20
#: Most items in one rank's plan.
MAX_ITEMS = 1 << 22
#: Most cells (items times dimensions) of one rank's plan.
MAX_CELLS = 1 << 24
#: Most bytes that one compressed payload may inflate to.
MAX_INFLATED_BYTES = 256 << 20
#: Most bytes of the blobs of one call as sent. With the extents and properties of a registration beside them
#: the call stays below the 16 MiB that servers take.
MAX_BLOB_BYTES = 7 << 20
#: A blob up to this size is sent unasked the first time: that costs less than the round trip in which it is asked for.
SMALL_BLOB_BYTES = 1024
#: Most bytes of one registration's extents as sent.
MAX_EXTENTS_BYTES = 4 << 20
#: Most bytes of one registration's extents with checksums, which no two ranks have in common: those of all ranks of a
#: segment stay far below ``MAX_INFLATED_BYTES``. Some 130,000 items of a rank; above that it keeps none.
MAX_CHECKED_EXTENTS_BYTES = 512 << 10
#: Most bytes of a file name below an attempt's prefix, in UTF-8.
MAX_FILE_NAME_BYTES = 4096
#: Longest transform descriptor, and most distinct descriptor lists of one rank.
MAX_TRANSFORM_LISTS = 1 << 12
#: Most ranks whose extents share one stored segment.
SEGMENT_RANKS = 256
#: Longest project, run or part name.
MAX_NAME_CHARS = 128
#: Longest location or prefix, in UTF-8 bytes.
MAX_LOCATION_BYTES = 4096
#: Longest host, user, job id.
MAX_LABEL_CHARS = 256
#: Most labels and most metrics of a checkpoint, and the longest name of one; values of labels are as long as hosts.
MAX_LABELS = 64
MAX_METRICS = 64
MAX_LABEL_NAME_CHARS = 63
#: Most bytes of the JSON text of a note.
MAX_NOTE_BYTES = 64 << 10
#: Most origins that a job tells of a checkpoint, most edges of lineage about one, and the longest name, in bytes of
#: UTF-8, of what is not in the catalogue.
MAX_ORIGINS = 16
MAX_LINEAGE_EDGES = 1000
MAX_LINEAGE_NAME_BYTES = 1024
#: How far lineage is followed in one answer: edges away, when nobody says and at most, and edges in each direction.
DEFAULT_LINEAGE_DEPTH = 10
MAX_LINEAGE_DEPTH = 100
MAX_LINEAGE_SHOWN = 1000
#: Most checkpoints that one may come from: so many are looked at before an edge is taken for no cycle.
MAX_ANCESTORS = 10_000
#: Longest filter and order of a listing, most comparisons in a filter, how deep parentheses and NOT may nest, and most
#: fields of an order.
MAX_FILTER_CHARS = 2048
MAX_COMPARISONS = 64
MAX_FILTER_DEPTH = 16
MAX_ORDER_FIELDS = 4
#: Longest time that a hold may last without being extended, seconds, and most holds of a checkpoint.
MAX_HOLD_S = 30 * 86_400
MAX_HOLDS = 64
#: Largest number of a retention policy, and most metrics that it keeps the best of.
MAX_POLICY_NUMBER = 2**53
MAX_KEEP_BEST = 8
#: Most checkpoints that one call prunes, and most locations that one directory may be known by.
MAX_PRUNED = 500
MAX_SAME_LOCATIONS = 64
#: Longest failure reason that a rank may report.
MAX_REASON_CHARS = 2000
#: Most warnings kept on a checkpoint, and most field violations of one error.
MAX_WARNINGS = 50
MAX_VIOLATIONS = 50
#: Most missing ranks named in one answer.
MAX_NAMED_RANKS = 50
#: Most ranges of ranks that are told of one host.
MAX_RANK_RANGES = 20
#: Most open attempts of a part that are told one by one.
MAX_OPEN_SHOWN = 10
#: Most files named in one report.
MAX_NAMED_FILES = 50
#: Longest wait inside one call, seconds.
MAX_WAIT_S = 20.0
#: Page sizes of listings.
DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000
#: Most registrations in one RecordCheckpoint call.
MAX_RECORD_REGISTRATIONS = 4096
#: Blobs sent with one call of a rank: a table, a plan and a structure, and some more; with one RecordCheckpoint.
MAX_BLOBS = 16
MAX_RECORD_BLOBS = 3 * MAX_RECORD_REGISTRATIONS
#: Most pairs of boxes that the tensors of one checkpoint may take to be told apart, where no grid does it.
MAX_BOX_COMPARISONS = 1 << 26
#: Bytes that the metadata header of a checkpoint inflates to.
MAX_HEADER_BYTES = 4 << 20
#: Calls that one stream of a relay has in progress; relays keep to it, and servers read no further beyond it.
MAX_RELAYED_CALLS = 1024
#: Most tensors and most boxes of one query for chunks, and most bytes that a query inflates to.
MAX_WANTED_TENSORS = 1 << 18
MAX_WANTED_BOXES = 1 << 20
MAX_WANTED_BYTES = 64 << 20
#: Most bytes of one query as sent.
MAX_QUERY_BYTES = 4 << 20
