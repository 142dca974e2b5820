#include "reader.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "crc32c.h"

namespace {

template <typename T>
T load(const uint8_t* array, uint64_t i) {
    T value;
    std::memcpy(&value, array + i * sizeof(T), sizeof(T));
    return value;
}

}  // namespace

ShardFile::ShardFile(std::string path) : path_(std::move(path)) {
    int file = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status {};
    if (file < 0 || ::fstat(file, &status) != 0) {
        std::string reason = std::strerror(errno);
        if (file >= 0) ::close(file);
        damaged("cannot be opened (" + reason + ")");
    }
    bytes_ = status.st_size;
    if (!S_ISREG(status.st_mode) || bytes_ < sizeof(Header) + sizeof(Footer)) {
        ::close(file);
        damaged("is no whole shard (" + std::to_string(bytes_) + " bytes)");
    }
    void* map = ::mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, file, 0);
    int error = errno;
    ::close(file);
    if (map == MAP_FAILED) throw UserError(path_ + ": cannot be mapped: " + std::strerror(error) + "; free memory, then run again");
    map_ = static_cast<const uint8_t*>(map);
    try {
        check();
    } catch (...) {
        ::munmap(map, bytes_);  // no destructor runs for an object that was never built
        throw;
    }
}

ShardFile::~ShardFile() { ::munmap(const_cast<uint8_t*>(map_), bytes_); }

void ShardFile::check() {
    std::memcpy(&header_, map_, sizeof header_);
    std::memcpy(&footer_, map_ + bytes_ - sizeof footer_, sizeof footer_);
    const Header& h = header_;
    const Footer& f = footer_;

    if (std::memcmp(h.magic, kHeaderMagic, sizeof kHeaderMagic) != 0) damaged("does not begin as a shard does");
    if (h.version != kVersion) damaged("is of format version " + std::to_string(h.version) + ", this program reads " + std::to_string(kVersion));
    if (h.crc != crc32c(&h, offsetof(Header, crc))) damaged("the header's checksum is wrong");
    if (h.vocab_size < 1 || h.vocab_size > (1u << 24) || h.token_bytes != token_bytes_for(h.vocab_size)) damaged("the header's sizes make no sense");

    if (std::memcmp(f.magic, kFooterMagic, sizeof kFooterMagic) != 0) damaged("does not end as a shard does: it is cut off or not finished");
    if (f.crc != crc32c(&f, offsetof(Footer, crc), crc32c(&h, sizeof h))) damaged("the footer's checksum is wrong");
    if (f.records > kMaxCount || f.fields > kMaxCount || f.tokens > kMaxCount) damaged("the footer's counts make no sense");
    uint64_t data_bytes = f.tokens * h.token_bytes;
    uint64_t index_size = index_bytes(f.records, f.fields, data_bytes);
    if (f.index_offset != sizeof(Header) + data_bytes || bytes_ != f.index_offset + index_size + sizeof(Footer))
        damaged("its size is " + std::to_string(bytes_) + " bytes, which the footer's counts do not give");

    if (f.index_crc != crc32c(map_ + f.index_offset, index_size)) damaged("the index's checksum is wrong");
    groups_ = map_ + f.index_offset;
    scores_ = groups_ + f.records * 8;
    field_start_ = scores_ + f.records * 4;
    token_start_ = field_start_ + (f.records + 1) * 4;
    block_crc_ = token_start_ + (f.fields + 1) * 4;
    auto check_starts = [&](const uint8_t* starts, uint64_t count, uint64_t total, uint64_t max_step, const char* what) {
        uint32_t before = 0;
        bool good = load<uint32_t>(starts, 0) == 0 && load<uint32_t>(starts, count) == total;
        for (uint64_t i = 1; i <= count; ++i) {
            uint32_t now = load<uint32_t>(starts, i);
            good &= now >= before && now - before <= max_step;
            before = now;
        }
        if (!good) damaged(std::string("the index of ") + what + " makes no sense");
    };
    check_starts(field_start_, f.records, f.fields, kMaxFields, "fields");
    check_starts(token_start_, f.fields, f.tokens, kMaxCount, "tokens");
    checked_ = std::make_unique<std::atomic<bool>[]>(block_count(data_bytes));
}

uint32_t ShardFile::field_count(uint64_t record) const {
    return load<uint32_t>(field_start_, record + 1) - load<uint32_t>(field_start_, record);
}

Span ShardFile::field(uint64_t record, uint64_t field) const {
    uint64_t i = load<uint32_t>(field_start_, record) + field;
    uint32_t begin = load<uint32_t>(token_start_, i);
    return {begin, load<uint32_t>(token_start_, i + 1) - begin};
}

float ShardFile::score(uint64_t record) const { return load<float>(scores_, record); }

int64_t ShardFile::group(uint64_t record) const { return load<int64_t>(groups_, record); }

void ShardFile::read(Span span, int32_t* out) const {
    if (span.count == 0) return;
    uint64_t width = header_.token_bytes, begin = span.begin * width;
    check_blocks(begin, begin + span.count * width);
    const uint8_t* at = map_ + sizeof(Header) + begin;
    uint32_t highest = 0;
    for (uint32_t i = 0; i < span.count; ++i) {
        // Four bytes are loaded where a token has two or three: past the last token stands the index, so that is inside the map.
        uint32_t id;
        std::memcpy(&id, at + i * width, 4);
        id &= width == 2 ? 0xFFFF : 0xFFFFFF;
        highest = std::max(highest, id);
        out[i] = static_cast<int32_t>(id);
    }
    if (highest >= header_.vocab_size) damaged("holds the token id " + std::to_string(highest) + ", outside its vocabulary of " + std::to_string(header_.vocab_size));
}

void ShardFile::check_blocks(uint64_t begin_byte, uint64_t end_byte) const {
    uint64_t data_bytes = footer_.tokens * header_.token_bytes;
    for (uint64_t block = begin_byte / kBlockBytes; block * kBlockBytes < end_byte; ++block) {
        if (checked_[block].load(std::memory_order_relaxed)) continue;
        uint64_t start = block * kBlockBytes;
        if (crc32c(map_ + sizeof(Header) + start, std::min(kBlockBytes, data_bytes - start)) != load<uint32_t>(block_crc_, block))
            damaged("the checksum of token block " + std::to_string(block) + " is wrong");
        checked_[block].store(true, std::memory_order_relaxed);
    }
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
        throw std::out_of_range("record: expected 0 to " + std::to_string(records()) + " (exclusive), got " + std::to_string(record));
    uint64_t file = std::upper_bound(first_record_.begin(), first_record_.end(), static_cast<uint64_t>(record)) - first_record_.begin() - 1;
    return {files_[file].get(), record - first_record_[file]};
}

std::pair<const ShardFile*, Span> ShardSet::find(int64_t record, int64_t field) const {
    Place place = find(record);
    uint32_t count = place.file->field_count(place.record);
    if (field < 0 || field >= count)
        throw std::out_of_range("field: record " + std::to_string(record) + " has " + std::to_string(count) + " fields, asked for field " + std::to_string(field));
    return {place.file, place.file->field(place.record, field)};
}
