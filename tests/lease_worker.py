"""A worker of tests/test_lease.py, in a process of its own: it lends items, logs each and submits, until the queue is empty.

    python lease_worker.py HOME DATABASE QUEUE OWNER LEASE_S [slow]

The log is written in the transaction that ends the lease. `slow` takes so long over an item that it can be killed while it holds a batch.
"""
import sys, time

import sqlalchemy as sa

from fsml_lab.core import Lab, ensure
from fsml_lab.lease import LeaseQueue

META = sa.MetaData()
LOG = sa.Table("log", META, sa.Column("item_id", sa.String), sa.Column("owner", sa.String))


def main(home, database, queue, owner, lease_s, slow=""):
    lab = Lab(home, database=database, durability="normal")
    ensure(lab, META)
    q = LeaseQueue(lab, queue, lease_s=float(lease_s), max_attempts=None)
    while True:
        leases = q.claim(owner, 5)
        if not leases:
            n = q.counts()
            if not n["open"] and not n["leased"]: return
            time.sleep(.02)
        for k, lease in enumerate(leases):
            if slow and k == 2:
                print("holding", flush=True)
                time.sleep(60)
            with lab.write() as conn:
                if q.submit(lease, conn): conn.execute(LOG.insert().values(item_id=lease.item_id, owner=owner))


if __name__ == "__main__": main(*sys.argv[1:])
