// Merges sorted runs of places, two at a time, into runs of twice the length: an invocation a place, which looks up its rank in the other run.
// Places are in the order of their ids, those of one id in their own order. At most 32 steps an invocation.
{# Inside: i < total, the elements of both lists; the other run is searched below its end, at most total. A place is clamped to count. Ranks of
   one run are different numbers below the length of the result. #}
{% include "shared/group" %}

{% if keys %}
// What gather_sort leaves, which is id * run + place within the run.
fn place_at(i: u32) -> u32 {
    let key = sorted_at(i);
    return select(i / {{ run }}u * {{ run }}u + key % {{ run }}u, {{ count }}u, key == 0xffffffffu);
}
{% else %}
fn place_at(i: u32) -> u32 {
    return sorted_at(i);
}
{% endif %}

// Places that do not exist come last.
fn id_of(place: u32) -> u32 {
    return select(0xffffffffu, ids_at(min(place, {{ count - 1 }}u)), place < {{ count }}u);
}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let i = group_id(wid) * {{ size }}u + lid;
    if (i >= {{ total }}u) {
        return;
    }
    let base = i / {{ 2 * run }}u * {{ 2 * run }}u;
    let is_first = i - base < {{ run }}u;
    let own = (i - base) % {{ run }}u;
    let other = base + select(0u, {{ run }}u, is_first);
    let place = place_at(i);
    let id = id_of(place);
    var low = 0u;
    var high = min({{ run }}u, {{ total }}u - min(other, {{ total }}u));
    while (low < high) {
        let middle = (low + high) / 2u;
        let found = id_of(place_at(other + middle));
        if (found < id || (found == id && !is_first)) {
            low = middle + 1u;
        } else {
            high = middle;
        }
    }
    merged_put(base + own + low, place);
}
