#include "shards/reader.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>

#include "shards/crc32c.h"
#include "shards/sigbus.h"

namespace {

template <typename T>
T load(const uint8_t* array, uint64_t i) {
    T value;
    std::memcpy(&value, array + i * sizeof(T), sizeof(T));
    return value;
}

int64_t modified(const struct stat& status) {
    return status.st_mtim.tv_sec * int64_t{1'000'000'000} + status.st_mtim.tv_nsec;
}

}  // namespace

ShardFile::ShardFile(std::string path) : path_(std::move(path)) {
    install_sigbus_handler();
    int file = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status{};
    if (file < 0 || ::fstat(file, &status) != 0) {
        std::string reason = std::strerror(errno);
        if (file >= 0) ::close(file);
        damaged("cannot be opened (" + reason + ")");
    }
    bytes_ = status.st_size;
    inode_ = status.st_ino;
    changed_ = modified(status);
    if (!S_ISREG(status.st_mode) || bytes_ < sizeof(Header) + sizeof(Footer)) {
        ::close(file);
        damaged("is no whole shard (" + std::to_string(bytes_) + " bytes)");
    }
    void* map = ::mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, file, 0);
    int error = errno;
    ::close(file);
    if (map == MAP_FAILED)
        throw UserError(path_ + ": cannot be mapped: " + std::strerror(error) + "; free memory, then run again");
    ::madvise(map, bytes_, MADV_RANDOM);  // records come in random order: the pages around one are not its neighbours'
    map_ = static_cast<const uint8_t*>(map);
    try {
        check_ends();
    } catch (...) {
        ::munmap(map, bytes_);  // no destructor runs for an object that was never built
        throw;
    }
}

ShardFile::~ShardFile() { ::munmap(const_cast<uint8_t*>(map_), bytes_); }

template <typename F>
void ShardFile::guarded(const F& f) const {
    if (!survives(f)) damaged("was cut short while in use, or the disk cannot read it");
}

void ShardFile::check_ends() {
    guarded([&] {
        std::memcpy(&header_, map_, sizeof header_);
        std::memcpy(&footer_, map_ + bytes_ - sizeof footer_, sizeof footer_);
    });
    const Header& h = header_;
    const Footer& f = footer_;

    if (std::memcmp(h.magic, kHeaderMagic, sizeof kHeaderMagic) != 0) damaged("does not begin as a shard does");
    if (h.version != kVersion)
        damaged("is of format version " + std::to_string(h.version) + ", this program reads " +
                std::to_string(kVersion));
    if (h.crc != crc32c(&h, offsetof(Header, crc))) damaged("the header's checksum is wrong");
    if (h.vocab_size < 1 || h.vocab_size > (1u << 24) || h.token_bytes != token_bytes_for(h.vocab_size))
        damaged("the header's sizes make no sense");

    if (std::memcmp(f.magic, kFooterMagic, sizeof kFooterMagic) != 0)
        damaged("does not end as a shard does: it is cut off or not finished");
    if (f.crc != crc32c(&f, offsetof(Footer, crc), crc32c(&h, sizeof h))) damaged("the footer's checksum is wrong");
    if (f.records > kMaxCount || f.fields > kMaxCount || f.tokens > kMaxCount)
        damaged("the footer's counts make no sense");
    uint64_t data_bytes = f.tokens * h.token_bytes;
    uint64_t index_size = index_bytes(f.records, f.fields, data_bytes);
    if (f.index_offset != sizeof(Header) + data_bytes || bytes_ != f.index_offset + index_size + sizeof(Footer))
        damaged("its size is " + std::to_string(bytes_) + " bytes, which the footer's counts do not give");

    groups_ = map_ + f.index_offset;
    scores_ = groups_ + f.records * 8;
    field_start_ = scores_ + f.records * 4;
    token_start_ = field_start_ + (f.records + 1) * 4;
    block_crc_ = token_start_ + (f.fields + 1) * 4;
}

void ShardFile::check_index() const {
    if (index_checked_.load(std::memory_order_acquire)) return;
    std::lock_guard lock(index_mutex_);
    if (index_checked_.load(std::memory_order_relaxed)) return;
    uint64_t data_bytes = footer_.tokens * header_.token_bytes;
    uint32_t crc = 0;
    bool fields_good = false, tokens_good = false;
    auto ascends = [](const uint8_t* starts, uint64_t count, uint64_t total, uint64_t max_step) {
        uint32_t before = 0;
        bool good = load<uint32_t>(starts, 0) == 0 && load<uint32_t>(starts, count) == total;
        for (uint64_t i = 1; i <= count; ++i) {
            uint32_t now = load<uint32_t>(starts, i);
            good &= now >= before && now - before <= max_step;
            before = now;
        }
        return good;
    };
    guarded([&] {
        crc = crc32c(groups_, index_bytes(footer_.records, footer_.fields, data_bytes));
        fields_good = ascends(field_start_, footer_.records, footer_.fields, kMaxFields);
        tokens_good = ascends(token_start_, footer_.fields, footer_.tokens, kMaxCount);
    });
    if (crc != footer_.index_crc) damaged("the index's checksum is wrong");
    if (!fields_good) damaged("the index of fields makes no sense");
    if (!tokens_good) damaged("the index of tokens makes no sense");
    blocks_checked_ = std::make_unique<std::atomic<uint64_t>[]>(block_count(data_bytes) / 64 + 1);
    index_checked_.store(true, std::memory_order_release);
}

// The functions below compare every number of the index with the footer again, since the file may have been rewritten.

std::pair<uint32_t, uint32_t> ShardFile::fields_of(uint64_t record) const {
    check_index();
    uint32_t first = 0, last = 0;
    guarded([&] {
        first = load<uint32_t>(field_start_, record);
        last = load<uint32_t>(field_start_, record + 1);
    });
    if (first > last || last > footer_.fields) damaged("was rewritten while in use");
    return {first, last};
}

Span ShardFile::tokens_of(uint32_t first_field, uint32_t last_field) const {
    uint32_t begin = 0, end = 0;
    guarded([&] {
        begin = load<uint32_t>(token_start_, first_field);
        end = load<uint32_t>(token_start_, last_field);
    });
    if (begin > end || end > footer_.tokens) damaged("was rewritten while in use");
    return {begin, end - begin};
}

uint32_t ShardFile::field_count(uint64_t record) const {
    auto [first, last] = fields_of(record);
    return last - first;
}

Span ShardFile::field(uint64_t record, uint64_t field) const {
    auto [first, last] = fields_of(record);
    if (first + field >= last) damaged("was rewritten while in use");
    return tokens_of(first + field, first + field + 1);
}

Span ShardFile::whole(uint64_t record) const {
    auto [first, last] = fields_of(record);
    return tokens_of(first, last);
}

float ShardFile::score(uint64_t record) const {
    check_index();
    float score = 0;
    guarded([&] { score = load<float>(scores_, record); });
    return score;
}

int64_t ShardFile::group(uint64_t record) const {
    check_index();
    int64_t group = 0;
    guarded([&] { group = load<int64_t>(groups_, record); });
    return group;
}

// highest_of(first byte) takes the span's tokens and returns the highest, once their blocks are known to be whole.
template <typename F>
void ShardFile::checked(uint64_t record, Span span, const F& highest_of) const {
    if (span.count == 0) return;
    uint64_t width = header_.token_bytes, begin = span.begin * width, end = begin + span.count * width;
    uint64_t data_bytes = footer_.tokens * width;
    uint64_t bad_block = UINT64_MAX;
    uint32_t highest = 0;
    guarded([&] {
        for (uint64_t block = begin / kBlockBytes; block * kBlockBytes < end; ++block) {
            if (block_is_checked(block)) continue;
            uint64_t start = block * kBlockBytes;
            if (crc32c(map_ + sizeof(Header) + start, std::min(kBlockBytes, data_bytes - start)) !=
                load<uint32_t>(block_crc_, block)) {
                bad_block = block;
                return;
            }
            blocks_checked_[block / 64].fetch_or(uint64_t{1} << (block % 64), std::memory_order_relaxed);
        }
        highest = highest_of(map_ + sizeof(Header) + begin);
    });
    if (bad_block != UINT64_MAX)
        damaged("record " + std::to_string(record) + ": the checksum of token block " + std::to_string(bad_block) +
                " is wrong");
    if (highest >= header_.vocab_size)
        damaged("record " + std::to_string(record) + ": holds the token id " + std::to_string(highest) +
                ", outside its vocabulary of " + std::to_string(header_.vocab_size));
}

void ShardFile::read(uint64_t record, Span span, const Sequence& out) const {
    checked(record, span, [&](const uint8_t* at) { return widen(at, header_.token_bytes, span.count, out); });
}

void ShardFile::copy(uint64_t record, Span span, uint8_t* out) const {
    checked(record, span, [&](const uint8_t* at) {
        std::memcpy(out, at, uint64_t{span.count} * header_.token_bytes);
        return widen(at, header_.token_bytes, span.count, {});
    });
}

void ShardFile::prefetch_record(uint64_t record) const {
    __builtin_prefetch(groups_ + record * 8);
    __builtin_prefetch(scores_ + record * 4);
    __builtin_prefetch(field_start_ + record * 4);
}

void ShardFile::prefetch_fields(uint64_t record) const {
    __builtin_prefetch(token_start_ + uint64_t{fields_of(record).first} * 4);
}

void ShardFile::prefetch(Span span) const {
    const uint64_t line = 64, lines = 32;  // the CPU sees by itself where a longer read goes on
    uint64_t width = header_.token_bytes;
    const uint8_t* begin = map_ + sizeof(Header) + span.begin * width;
    uint64_t bytes = std::min(span.count * width, lines * line);
    for (uint64_t at = 0; at < bytes; at += line) __builtin_prefetch(begin + at);
}

void ShardFile::read_ahead(Span span) const {
    uint64_t width = header_.token_bytes, begin = span.begin * width, end = begin + span.count * width;
    bool all_checked = true;
    for (uint64_t block = begin / kBlockBytes; block * kBlockBytes < end; ++block)
        all_checked &= block_is_checked(block);
    if (all_checked) return;
    // madvise wants the address on a page; a larger page size only makes it fail, and it is a hint
    const uint64_t page = 4096;
    uint64_t first = (sizeof(Header) + begin / kBlockBytes * kBlockBytes) / page * page;
    uint64_t last = std::min(bytes_, sizeof(Header) + (end + kBlockBytes - 1) / kBlockBytes * kBlockBytes);
    ::madvise(const_cast<uint8_t*>(map_) + first, last - first, MADV_WILLNEED);
}

int64_t ShardFile::steady_now() {
    return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

void ShardFile::check_unchanged(int64_t now) const {
    if (now < look_again_.load(std::memory_order_relaxed)) return;
    look_again_.store(now + 1'000'000'000, std::memory_order_relaxed);
    struct stat status{};
    if (::stat(path_.c_str(), &status) != 0)
        damaged(std::string("was removed while in use (") + std::strerror(errno) + ")");
    if (status.st_ino != inode_ || static_cast<uint64_t>(status.st_size) != bytes_ || modified(status) != changed_)
        damaged("was rewritten while in use");
}

void ShardFile::damaged(const std::string& what) const {
    std::string folder = std::filesystem::path(path_).parent_path().string();
    throw UserError(path_ + ": " + what + "; delete " + folder + " and run again: it is rebuilt from the source");
}

ShardSet::ShardSet(const std::vector<std::string>& paths) {
    for (const std::string& path : paths) {
        files_.push_back(std::make_unique<ShardFile>(path));
        first_record_.push_back(first_record_.back() + files_.back()->footer().records);
    }
}

ShardSet::Place ShardSet::find(int64_t record) const {
    if (record < 0 || record >= static_cast<int64_t>(records()))
        throw std::out_of_range("record: expected 0 to " + std::to_string(records()) + " (exclusive), got " +
                                std::to_string(record));
    uint64_t file = std::upper_bound(first_record_.begin(), first_record_.end(), static_cast<uint64_t>(record)) -
                    first_record_.begin() - 1;
    return {files_[file].get(), record - first_record_[file]};
}

std::pair<ShardSet::Place, Span> ShardSet::find(int64_t record, int64_t field) const {
    Place place = find(record);
    uint32_t count = place.file->field_count(place.record);
    if (field < 0 || field >= count)
        throw std::out_of_range("field: record " + std::to_string(record) + " has " + std::to_string(count) +
                                " fields, asked for field " + std::to_string(field));
    return {place, place.file->field(place.record, field)};
}
