// The same as gather_links, from sorted runs of places: an invocation a position. A neighbour in the run or, in other runs, a
// binary search finds the next place and tells whether there is an earlier one. At most 11 steps a run, in {{ runs }} runs.
{% include "shared/group" %}

// First position of a run whose key is not below `wanted`; `run` if there is none.
fn lower_bound(begin: u32, wanted: u32) -> u32 {
    var position = 0u;
    for (var step = {{ run // 2 }}u; step > 0u; step = step >> 1u) {
        position += select(0u, step, sorted_at(begin + position + step - 1u) < wanted);
    }
    return position + select(0u, 1u, sorted_at(begin + position) < wanted);
}

// The key with which an id begins in a run, or one of another id.
fn find(begin: u32, id: u32) -> u32 {
    return sorted_at(begin + min(lower_bound(begin, id * {{ run }}u), {{ run - 1 }}u));
}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let i = group_id(wid) * {{ size }}u + lid;
    if (i >= {{ runs * run }}u) {
        return;
    }
    let key = sorted_at(i);
    let own = i / {{ run }}u;
    let n = own * {{ run }}u + key % {{ run }}u;
    if (key == 0xffffffffu) {
        return;
    }
    let id = key / {{ run }}u;
    var is_first = i % {{ run }}u == 0u || sorted_at(max(i, 1u) - 1u) / {{ run }}u != id;
    for (var other = 0u; other < own && is_first; other++) {
        is_first = find(other * {{ run }}u, id) / {{ run }}u != id;
    }
{% if padding >= 0 %}
    is_first = is_first && id != {{ padding }}u;
{% endif %}
    var next = {{ count }}u;
    let behind = sorted_at(min(i + 1u, {{ runs * run - 1 }}u));
    if (i % {{ run }}u != {{ run - 1 }}u && behind / {{ run }}u == id) {
        next = own * {{ run }}u + behind % {{ run }}u;
    }
    for (var other = own + 1u; other < {{ runs }}u && next == {{ count }}u; other++) {
        let found = find(other * {{ run }}u, id);
        next = select(next, other * {{ run }}u + found % {{ run }}u, found / {{ run }}u == id);
    }
    links_put(n, next);
    links_put({{ count }}u + n, select(0u, 1u, is_first));
}
