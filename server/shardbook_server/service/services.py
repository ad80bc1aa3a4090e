"""All services over one database, wired."""

from __future__ import annotations

from dataclasses import dataclass

from shardbook_server.observer import SILENT, Observer
from shardbook_server.service.admission import MemoryBudget
from shardbook_server.service.aliases import AliasService
from shardbook_server.service.blobs import BlobService
from shardbook_server.service.catalog import CatalogService
from shardbook_server.service.claims import ClaimService
from shardbook_server.service.commit import CommitService
from shardbook_server.service.deletion import UNDELETE_S, DeletionService
from shardbook_server.service.descriptions import DescriptionService
from shardbook_server.service.events import EventService
from shardbook_server.service.holds import HoldService
from shardbook_server.service.lineage import LineageService
from shardbook_server.service.locations import LocationService
from shardbook_server.service.metadata import MetadataService
from shardbook_server.service.plans import PlanService
from shardbook_server.service.progress import ProgressService
from shardbook_server.service.query import QueryService
from shardbook_server.service.record import RecordService
from shardbook_server.service.registration import RegistrationService
from shardbook_server.service.requests import RequestService
from shardbook_server.service.retention import RetentionService
from shardbook_server.service.sessions import REAP_INTERVAL_S, SessionService
from shardbook_server.service.status import StatusService
from shardbook_server.storage.database import Database

#: How long a lease lasts without a sign of life, seconds.
LEASE_TTL_S = 60.0
#: Decoded blobs kept in memory, bytes.
BLOB_CACHE_BYTES = 256 << 20
#: Decoded entries of checkpoints that are loaded from, bytes.
INDEX_CACHE_BYTES = 128 << 20
#: Memory for deciding about plans and for assembling checkpoints that are new, bytes.
WORK_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True)
class Services:
    """One of each service."""

    sessions: SessionService
    blobs: BlobService
    plans: PlanService
    registrations: RegistrationService
    progress: ProgressService
    commits: CommitService
    records: RecordService
    metadata: MetadataService
    queries: QueryService
    catalog: CatalogService
    status: StatusService
    descriptions: DescriptionService
    aliases: AliasService
    holds: HoldService
    deletions: DeletionService
    retention: RetentionService
    lineage: LineageService
    events: EventService
    claims: ClaimService
    locations: LocationService
    requests: RequestService


def build_services(
    database: Database,
    *,
    lease_ttl_s: float = LEASE_TTL_S,
    reap_interval_s: float = REAP_INTERVAL_S,
    blob_cache_bytes: int = BLOB_CACHE_BYTES,
    index_cache_bytes: int = INDEX_CACHE_BYTES,
    work_memory_bytes: int = WORK_MEMORY_BYTES,
    undelete_s: float = UNDELETE_S,
    observer: Observer = SILENT,
) -> Services:
    """Returns the services over ``database``."""
    blobs = BlobService(database, cache_bytes=blob_cache_bytes)
    memory = MemoryBudget(work_memory_bytes)
    commits = CommitService(database, blobs, memory, lease_ttl_s=lease_ttl_s, observer=observer)
    catalog = CatalogService(database)
    plans = PlanService(database, blobs, memory, lease_ttl_s=lease_ttl_s, observer=observer)
    return Services(
        sessions=SessionService(database, lease_ttl_s=lease_ttl_s, reap_interval_s=reap_interval_s, observer=observer),
        blobs=blobs,
        plans=plans,
        registrations=RegistrationService(database, blobs, lease_ttl_s=lease_ttl_s, observer=observer),
        progress=ProgressService(database),
        commits=commits,
        records=RecordService(database, blobs, commits, lease_ttl_s=lease_ttl_s),
        metadata=MetadataService(database),
        queries=QueryService(database, cache_bytes=index_cache_bytes),
        catalog=catalog,
        status=StatusService(database, catalog, plans),
        descriptions=DescriptionService(database),
        aliases=AliasService(database),
        holds=HoldService(database),
        deletions=DeletionService(database, undelete_s=undelete_s),
        retention=RetentionService(database, undelete_s=undelete_s),
        lineage=LineageService(database),
        events=EventService(database),
        claims=ClaimService(database),
        locations=LocationService(database),
        requests=RequestService(database),
    )
