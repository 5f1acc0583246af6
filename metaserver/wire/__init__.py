"""The protocol between a client and the metaserver: frames, typed messages and error codes.

A frame is a big-endian u32 body length and a MessagePack body ``[id, [tag, field, ...]]``. The id pairs a reply with
its request; a streamed reply is several frames with the id of the request. Bodies are arrays throughout, never maps,
so there are no duplicate keys to argue about; extension types are refused.

A request that changes something may be sent as ``[id, [tag, ...], slot, sequence]``, sequence from 1. The metaserver
keeps the outcome of each slot's last sequence with the commit: the same two numbers sent again, over whatever
connection of the session, to whatever run of the metaserver, get the first outcome. A higher sequence of a slot says
that the reply to the lower one is of no interest any more.

Frames of id 0 are the metaserver's own: a Failure that ends the connection, a :class:`LockSettled`, or a
:class:`Break`, which is to be answered by :class:`Acknowledge` (of id 0, too; it has no reply). A Break that a reply
depends on is sent before it.

Both sides check the length before they allocate, and :func:`decode_request` and :func:`decode_reply` check every
field's type and bounds, so the code behind them sees only well-typed messages.

Names, targets and xattr names are ``bytes``. Times are integer nanoseconds since 1970.
"""

from metaserver.wire.addresses import *
from metaserver.wire.base import *
from metaserver.wire.content import *
from metaserver.wire.events import *
from metaserver.wire.frames import *
from metaserver.wire.identities import *
from metaserver.wire.keep_alive import *
from metaserver.wire.locks import *
from metaserver.wire.namespace import *
from metaserver.wire.private_files import *
from metaserver.wire.sessions import *
from metaserver.wire.status import *
from metaserver.wire.tokens import *
