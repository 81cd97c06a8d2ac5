"""A bank on disk: what a user of it imports, and what its files are.

    bank/manifest.json                    what the bank is: model, tokenizer, counts, deleted documents, checksums
    bank/segment-<number>/table.json      documents in columns, and the size of every file of the segment
    bank/segment-<number>/{rk,k,v,ids}    zarr3 arrays, sharded, every inner chunk with a crc32c
    bank/unfinished.json                  only while a change is not finished: how far it has come
    bank/model                            a copy of the model that built it, where that is small

A segment is written once and never changed, and no two in the life of a bank have one number. Only the manifest says
which segments count; it is replaced last and atomically, so that an interruption leaves the old bank or the new one.
The bytes are a function of what was done to the bank: nothing in them is drawn at random or tells the time. The
checksums find damage; they are no signature against an author of forgeries.

Token ids are kept beside the vectors, so that the text of a document can be shown without its source file. The same
text in two files is stored once. Whatever is wrong with the files is a BankError of one line that names file and field.
"""

from memjax.in_storage.bank_arrays import DiskArray as DiskArray
from memjax.in_storage.bank_change import Change as Change
from memjax.in_storage.bank_change import unfinished as unfinished
from memjax.in_storage.bank_check import Verified as Verified
from memjax.in_storage.bank_check import verify as verify
from memjax.in_storage.bank_edit import Compacted as Compacted
from memjax.in_storage.bank_edit import append_documents as append_documents
from memjax.in_storage.bank_edit import compact as compact
from memjax.in_storage.bank_edit import delete_documents as delete_documents
from memjax.in_storage.bank_edit import delete_files as delete_files
from memjax.in_storage.bank_reader import OpenBank as OpenBank
from memjax.in_storage.bank_reader import open_bank as open_bank
from memjax.in_storage.bank_segment import Block as Block
from memjax.in_storage.bank_table import Documents as Documents
from memjax.in_storage.bank_table import Source as Source
from memjax.in_storage.bank_writer import BankWriter as BankWriter
